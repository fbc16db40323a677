"""Images of noise, to run networks on where no photograph is at hand."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine_format.model_card import ModelCard


def natural_noise(height: int, width: int, card: ModelCard, seed: int) -> NDArray[Any]:
    """An image with detail at many scales, [H, W, C] in the card's dtype, spread around the card's mean."""
    random = np.random.default_rng(seed)
    image: NDArray[Any] = np.zeros((height, width, card.channels), np.float32)
    for cell in (64, 16, 4, 1):
        rows, columns = -(-height // cell), -(-width // cell)
        values = random.standard_normal((rows, columns, card.channels), dtype=np.float32)
        image += np.repeat(np.repeat(values, cell, 0), cell, 1)[:height, :width] * 0.6
    image = image * np.asarray(card.std, np.float32) + np.asarray(card.mean, np.float32)
    if card.dtype == "float32":
        return image
    image = np.clip(image, np.iinfo(card.dtype).min, np.iinfo(card.dtype).max)
    return image.astype(card.dtype)
