"""Training samples: a crop of fixed size from an image of any size, scaled, flipped and brightened."""

import numpy as np
import torch
import torch.nn.functional as F

from calibration.metrics import IGNORE
from runtime.engine_file import ModelCard
from runtime.prepare import normalise


def augment(
    image: np.ndarray,
    labels: np.ndarray,
    card: ModelCard,
    crop: tuple[int, int],
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.5, 2.0),
    flip: bool = True,
    brightness: float = 0.25,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sample of an image and its labels.

    Args:
        image: [H, W, C] as the card says.
        labels: [H, W]; 255 is not counted.
        crop: (height, width) of the sample in pixels.
        rng: decides everything that is random here.
        scale: smallest and largest enlargement, drawn log-uniformly.
        flip: mirror half of the samples.
        brightness: largest change of contrast (relative) and of brightness (in standard deviations).

    Returns:
        (normalised float32 [C, *crop], int64 labels [*crop]); what lies outside the image is zero and 255.
    """
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
    normalise(image[y, x], card, part)
    gain, offset = 1 + rng.uniform(-brightness, brightness), rng.uniform(-brightness, brightness)
    pixels[:, *inside] = part * np.float32(gain) + np.float32(offset)
    target[inside] = labels[y, x]
    if flip and rng.random() < 0.5:
        pixels, target = pixels[:, :, ::-1].copy(), target[:, ::-1].copy()
    sample, wanted = torch.from_numpy(pixels), torch.from_numpy(target)
    if (height, width) != tuple(crop):
        sample = F.interpolate(sample[None], size=crop, mode="bilinear", antialias=factor < 1)[0]
        # Nearest by pixel centres, as the image is.
        rows = ((torch.arange(crop[0]) + 0.5) * height / crop[0]).long()
        columns = ((torch.arange(crop[1]) + 0.5) * width / crop[1]).long()
        wanted = wanted[rows[:, None], columns]
    return sample, wanted
