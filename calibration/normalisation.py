"""Mean and standard deviation of a collection's pixels, band by band: what a network's images are normalised by."""

import logging

import numpy as np
from fcn_deploy.calibration.datasets import FilePairs
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.errors import DeployError
from fcn_deploy.runtime.images.regions import open_regions

log = logging.getLogger(__name__)

MOST_IMAGES = 400  # spread evenly over larger collections
PIXELS = 1 << 20  # at a time
DIGITS = 6  # significant ones that a card keeps


def measure_normalisation(data: FilePairs, card: ModelCard) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of each band, over all pixels that are data, in the card's numbers. Memory does not grow with them.

    Sums are taken in float64 around the first pixels' mean (Chan, Golub and LeVeque, 1983).

    Args:
        data: of which MOST_IMAGES are read at most.
        card: how they are read; its mean and std are of no account.

    Raises:
        DeployError: no pixel is data, or an image is damaged.
        MisuseError: channels or a dtype that the card does not allow.
    """
    chosen = np.unique(np.linspace(0, len(data) - 1, min(len(data), MOST_IMAGES)).round().astype(int))
    count, shift = 0, np.zeros(card.channels)
    sums, squares = np.zeros(card.channels), np.zeros(card.channels)
    for index in chosen:
        with open_regions(data.pairs[index][0], card, data.reading) as image:
            height, width = image.shape[:2]
            rows = max(1, PIXELS // width)
            for top in range(0, height, rows):
                part = image[top : top + rows, :]
                values = np.asarray(part).reshape(-1, card.channels)
                if isinstance(part, np.ma.MaskedArray):
                    values = values[~np.ma.getmaskarray(part).any(axis=2).ravel()]
                if not len(values):
                    continue
                if not count:
                    shift = values.mean(axis=0, dtype=np.float64)
                centred = values - shift
                count += len(centred)
                sums += centred.sum(axis=0)
                squares += np.einsum("ij,ij->j", centred, centred)
    if not count:
        raise DeployError(f"the images of the training split, {data.name(0)} the first, have no data in any pixel")
    mean = shift + sums / count
    std = np.sqrt(np.maximum(squares / count - (sums / count) ** 2, 0))
    flat = std <= 1e-9 * np.maximum(np.abs(mean), 1)
    if flat.any():
        log.warning("band %d holds one value everywhere (%g)", int(np.flatnonzero(flat)[0]) + 1, mean[flat][0])
    std = np.where(flat, 1.0, std)
    return _rounded(mean), _rounded(std)


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(f"{value:.{DIGITS}g}") for value in values)
