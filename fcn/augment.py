"""Training samples: a crop of fixed size from an image of any size, scaled, turned, and changed in colour."""

import numpy as np
import torch
import torch.nn.functional as F
from fcn_deploy.calibration.metrics import IGNORE
from fcn_deploy.runtime.arrays import ImageSource
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.pixels.no_data import filled
from fcn_deploy.runtime.pixels.prepare import normalise


def augment(
    image: ImageSource,
    labels: np.ndarray,
    card: ModelCard,
    crop: tuple[int, int],
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.5, 2.0),
    flip: bool = True,
    turn: bool = False,
    brightness: float = 0.25,
    color: float = 0.0,
    blur: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sample of an image and its labels.

    Args:
        image: [H, W, C] as the card says; masked or not finite where it has no data.
        labels: [H, W]; 255 is not counted, and neither is what is no data.
        crop: (height, width) of the sample in pixels.
        rng: decides everything that is random here.
        scale: smallest and largest enlargement, drawn log-uniformly.
        flip: mirror half of the samples.
        turn: also upside down and by quarter turns, for images that have no up (Ronneberger et al., 2015).
        brightness: largest change of contrast (relative) and of brightness (in standard deviations).
        color: largest change of saturation (relative), and of each channel's gain (half of it).
        blur: share of the samples that are blurred, by a binomial filter of 5 pixels.

    Returns:
        (normalised float32 [C, *crop], int64 labels [*crop]); what lies outside the image, or is no data, is zero and
        255.
    """
    quarter = turn and rng.random() < 0.5
    if quarter:
        crop = crop[::-1]
    factor = float(np.exp(rng.uniform(*np.log(scale))))
    window = [max(1, round(side / factor)) for side in crop]
    tops = []
    for side, have in zip(window, image.shape[:2], strict=True):
        # A window larger than the image lies around it; a smaller one inside it.
        low, high = sorted((0, have - side))
        tops.append(int(rng.integers(low, high + 1)))
    (top, left), (height, width) = tops, window
    y = slice(max(top, 0), min(top + height, image.shape[0]))
    x = slice(max(left, 0), min(left + width, image.shape[1]))
    pixels = np.zeros((card.channels, height, width), np.float32)
    target = np.full((height, width), IGNORE, np.int64)
    inside = slice(y.start - top, y.stop - top), slice(x.start - left, x.stop - left)
    part = np.empty((card.channels, y.stop - y.start, x.stop - x.start), np.float32)
    given, invalid = filled(image[y, x], card)
    normalise(given, card, part)
    gain, offset = 1 + rng.uniform(-brightness, brightness), rng.uniform(-brightness, brightness)
    if color:
        part = _recolored(part, color, rng)
    part = part * np.float32(gain) + np.float32(offset)
    target[inside] = labels[y, x]
    if invalid is not None:  # the mean, as the runtime gives it, whatever becomes of the rest
        part[:, invalid] = 0
        target[inside][invalid] = IGNORE
    pixels[:, *inside] = part
    if flip and rng.random() < 0.5:
        pixels, target = pixels[:, :, ::-1].copy(), target[:, ::-1].copy()
    if turn and rng.random() < 0.5:
        pixels, target = pixels[:, ::-1].copy(), target[::-1].copy()
    sample, wanted = torch.from_numpy(pixels), torch.from_numpy(target)
    if (height, width) != tuple(crop):
        sample = F.interpolate(sample[None], size=crop, mode="bilinear", antialias=factor < 1)[0]
        # Nearest by pixel centres, as the image is.
        rows = ((torch.arange(crop[0]) + 0.5) * height / crop[0]).long()
        columns = ((torch.arange(crop[1]) + 0.5) * width / crop[1]).long()
        wanted = wanted[rows[:, None], columns]
    if blur and rng.random() < blur:
        sample = _blurred(sample)
    if quarter:
        sample, wanted = sample.transpose(1, 2).contiguous(), wanted.T.contiguous()
    return sample, wanted


def _recolored(pixels: np.ndarray, color: float, rng: np.random.Generator) -> np.ndarray:
    """Saturation and the gain of each channel changed, [C, H, W] float32."""
    saturation = np.float32(1 + rng.uniform(-color, color))
    gains = (1 + rng.uniform(-color / 2, color / 2, len(pixels))).astype(np.float32)
    grey = pixels.mean(0)
    return ((pixels - grey) * saturation + grey) * gains[:, None, None]


def _blurred(sample: torch.Tensor) -> torch.Tensor:
    """[C, H, W] filtered by 1 4 6 4 1 along both axes: a standard deviation of one pixel."""
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    sample = F.pad(sample[:, None], (2, 2, 2, 2), mode="replicate")
    return F.conv2d(F.conv2d(sample, kernel.view(1, 1, 5, 1)), kernel.view(1, 1, 1, 5))[:, 0]
