"""The images that calibration sees: real ones, at their own sizes, a seeded sample of a bounded number."""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from fcn_deploy.calibration.datasets import FilePairs, load_dataset
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.errors import DeployError
from fcn_deploy.runtime.images.find import find_or_read_list
from fcn_deploy.runtime.images.header import read_header
from fcn_deploy.runtime.images.numbers import COMMON, DoubtfulError, ReadOptions
from fcn_deploy.runtime.images.read import decode
from fcn_deploy.runtime.pixels.prepare import check_image

log = logging.getLogger(__name__)


@dataclass
class ImageStream:
    """Images of any sizes, read one at a time each time it is iterated over.

    Attributes:
        names: of the images, in the order they come.
        read: index → [H, W, C] as the card says, a MaskedArray where some of it is no data; raises DeployError where
            an image is broken.
        skipped: the broken ones met so far, and those without any data, with the reason.
    """

    names: list[str]
    read: Callable[[int], np.ndarray]
    skipped: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        """(name, image) of those that can be read."""
        for index, name in enumerate(self.names):
            if name in self.skipped:
                continue
            try:
                image = self.read(index)
                if isinstance(image, np.ma.MaskedArray) and np.ma.getmaskarray(image).any(axis=2).all():
                    raise DeployError(f"{name} has no data in any pixel")
            except DoubtfulError:
                raise
            except DeployError as error:
                self.skipped[name] = str(error)
                log.warning("skipped: %s", error)
                continue
            yield name, image

    def subset(self, indices: Iterable[int]) -> "ImageStream":
        """Some of the images, in the order of `indices`."""
        chosen = [int(index) for index in indices]
        return ImageStream([self.names[index] for index in chosen], lambda index: self.read(chosen[index]))


def open_stream(source: str, card: ModelCard, reading: ReadOptions = COMMON) -> ImageStream:
    """The images that `--calib` names, all of them.

    Args:
        source: a folder, a glob, a text file with one path a line (relative to the file), `digits`, or the root
            of a data set, whose train split is taken.
        card: how they are read.
        reading: what their numbers mean.

    Raises:
        MisuseError: no such source, or no images in it.
    """
    path = Path(source)
    if source == "digits" or (path.is_dir() and _is_dataset(path)):
        data = load_dataset(source, "train", card=card, reading=reading)
        names = [data.name(index) for index in range(len(data))]
        if isinstance(data, FilePairs):  # whose labels are not of interest here, and may be of any kind
            return ImageStream(names, data.image)
        return ImageStream(names, lambda index: check_image(data[index][0], card))
    files = find_or_read_list(source)
    return ImageStream([str(file) for file in files], lambda index: decode(read_header(files[index]), card, reading))


def _is_dataset(root: Path) -> bool:
    return (root / "ImageSets" / "Segmentation").is_dir() or any((root / name).is_dir() for name in ("train", "images"))


def divide(
    stream: ImageStream, count: int, held_out: int, seed: int = 0, seen: Collection[str] = ()
) -> tuple[ImageStream, ImageStream]:
    """A seeded sample to calibrate on, and others that calibration does not see.

    At most `count` and `held_out` images; of few images a fifth is held out. Of a single image both have it.

    Args:
        seen: names of images that were calibrated on before: none of them is held out, unless there are no others.
    """
    order = np.random.default_rng(seed).permutation(len(stream))
    fresh = [index for index in order if stream.names[index] not in seen]
    if len(order) == 1 or not fresh:
        return stream.subset(order[:count]), stream.subset(order[:held_out])
    apart = fresh[: min(held_out, max(1, len(order) // 5), len(order) - 1)]
    rest = [index for index in order if index not in set(apart)]
    return stream.subset(rest[:count]), stream.subset(apart)
