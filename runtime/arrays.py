"""The types of the arrays that go into a network and come out of it."""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8 | np.uint16 | np.int16 | np.float32]  # [H, W, C], of the card's channels and dtype
Labels = npt.NDArray[np.uint8 | np.uint16]  # [H, W]; uint16 for more than 256 classes
Masks = npt.NDArray[np.bool_]  # [K, H, W]
Floats = npt.NDArray[np.float32]  # scores [K, h, w]; probabilities and values [K, H, W]
Cells = npt.NDArray[np.intp]  # indices of rows or columns of a score map
AnyArray = npt.NDArray[Any]


def size_of(image: "ImageSource") -> tuple[int, int]:
    """(height, width) in pixels."""
    return image.shape[0], image.shape[1]


class ImageSource(Protocol):
    """What has an image's pixels and gives the part that is asked for: an array, a memory map, a reader of a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def ndim(self) -> int: ...

    def __getitem__(self, part: tuple[slice, slice], /) -> Any: ...
