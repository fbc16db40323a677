"""Labelled images: folders of pairs, the Pascal VOC layout, and the generated `digits`."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from fcn_deploy.calibration.digits import Digits
from fcn_deploy.calibration.label_files import read_labels
from fcn_deploy.calibration.metrics import IGNORE
from fcn_deploy.runtime.errors import DeployError, MisuseError
from fcn_deploy.runtime.images.find import IMAGE_SUFFIXES
from fcn_deploy.runtime.images.header import read_header
from fcn_deploy.runtime.images.read import read_image
from fcn_deploy.runtime.model_card import ModelCard, voc_palette

log = logging.getLogger(__name__)

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOID_NAMES = ("void", "ignore", "ignored", "unlabeled", "unlabelled")
CAMVID_COLORS = {
    "sky": (128, 128, 128), "building": (128, 0, 0), "pole": (192, 192, 128), "road": (128, 64, 128),
    "pavement": (60, 40, 222), "tree": (128, 128, 0), "sign": (192, 128, 128), "fence": (64, 64, 128),
    "car": (64, 0, 128), "pedestrian": (64, 64, 0), "bicyclist": (0, 128, 192),
}  # fmt: skip


class LabelledImages(Protocol):
    """A sequence of images of any sizes with their labels.

    `collection[i]` is (image [H, W, C] in the card's dtype, labels [H, W] uint8 or uint16), where the label
    255 is not counted; so there are at most 255 classes.
    """

    @property
    def classes(self) -> Sequence[str]: ...

    @property
    def colors(self) -> Sequence[tuple[int, int, int]]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]: ...

    def name(self, index: int) -> str: ...


@dataclass(frozen=True)
class FilePairs:
    """Image files paired with label files of the same stem.

    Attributes:
        pairs: (image, label) paths.
        classes, colors: of labels 0, 1, …
        void: a label in the files that is not counted, beside 255.
        card: how images are read; None: 8-bit RGB.
    """

    pairs: tuple[tuple[Path, Path], ...]
    classes: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    void: int | None = None
    card: ModelCard | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return self.pairs[index][0].name

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image_path, _ = self.pairs[index]
        image = read_image(image_path, self.card or ModelCard(self.classes))
        return image, self._labels(index, image.shape[:2])

    def labels(self, index: int) -> np.ndarray:
        """The labels of `self[index]`, checked likewise; of the image only its size is read."""
        return self._labels(index, read_header(self.pairs[index][0]).size)

    def _labels(self, index: int, size: tuple[int, int]) -> np.ndarray:
        image_path, label_path = self.pairs[index]
        labels = read_labels(label_path, self.colors)
        if labels.shape != size:
            raise DeployError(
                f"{label_path} is {labels.shape[0]}×{labels.shape[1]} and {image_path} is {size[0]}×"
                f"{size[1]}; labels must have their image's size (an EXIF rotation counts)"
            )
        labels = labels.copy()
        if self.void is not None:
            labels[labels == self.void] = IGNORE
        beyond = labels[(labels >= len(self.classes)) & (labels != IGNORE)]
        if beyond.size:
            raise DeployError(
                f"{label_path} holds class {beyond.max()}, and there are {len(self.classes)} classes (0 to "
                f"{len(self.classes) - 1}; {IGNORE} is ignored); mend the label, or name more classes in classes.txt"
            )
        return labels


def class_pixels(data: LabelledImages, classes: int) -> np.ndarray:
    """Counted pixels of each class in a collection, int64 [classes].

    Reading all labels is also the check, before hours of training, that they fit their images and the classes.

    Raises:
        DeployError: a label that is missing or damaged, of another size than its image, or holds an unknown class.
    """
    counts = np.zeros(classes, np.int64)
    for index in range(len(data)):
        labels = data.labels(index) if isinstance(data, FilePairs) else data[index][1]
        counts += np.bincount(labels[labels != IGNORE].ravel(), minlength=classes)[:classes]
    return counts


def load_dataset(
    data: str, split: str, *, seed: int = 0, count: int | None = None, card: ModelCard | None = None
) -> LabelledImages:
    """The labelled images that `--data` and `--split` name.

    Args:
        data: `digits`, or a folder: SPLIT/ with SPLITannot/ (or SPLIT_labels/), SPLIT/images/ with
            SPLIT/labels/, images/ with labels/ (every 10th by name is `val`), or Pascal VOC's JPEGImages/,
            SegmentationClass/ and ImageSets/Segmentation/SPLIT.txt.
        split: `train`, `val`, or another that the folder has.
        seed: of `digits`.
        count: take so many at most, spread evenly; for `digits`, make so many.
        card: how images are read and how many classes there are; None while no model exists.

    Names of classes come from classes.txt, one a line; a last one called void is not counted.

    Raises:
        MisuseError: no such data or split.
        DeployError: images without labels, or a damaged list.
    """
    if data == "digits":
        if split not in ("train", "val"):
            raise MisuseError(f"digits has no split {split!r}; choose train or val")
        return Digits(split, seed, count)
    root = Path(data)
    if not root.is_dir():
        raise MisuseError(f"{data} is not a folder; --data takes digits or a folder of labelled images")
    voc = (root / "ImageSets" / "Segmentation").is_dir()
    pairs = _voc_pairs(root, split) if voc else _folder_pairs(root, split)
    if count is not None and count < len(pairs):
        pairs = [pairs[i] for i in np.linspace(0, len(pairs) - 1, count).round().astype(int)]
    names = _class_names(root, pairs, VOC_CLASSES if voc else None, card)
    void = None
    if names[-1].lower() in VOID_NAMES:
        void, names = len(names) - 1, names[:-1]
    if card is not None:
        if len(names) != len(card.classes):
            raise MisuseError(
                f"{data} has {len(names)} classes and the model has {len(card.classes)}; use data with the "
                "classes the model was trained on"
            )
        if file_names := [name for name in names if name not in card.classes]:
            log.warning("%s names its classes otherwise than the model: %s", data, ", ".join(file_names[:3]))
        names = list(card.classes)
    if len(names) > IGNORE:
        raise MisuseError(f"{data} has {len(names)} classes; labelled data has at most {IGNORE}")
    palette = voc_palette(len(names))
    colors = card.colors if card else [CAMVID_COLORS.get(n.lower(), palette[i]) for i, n in enumerate(names)]
    return FilePairs(tuple(pairs), tuple(names), tuple(colors), void, card)


def _class_names(
    root: Path, pairs: Sequence[tuple[Path, Path]], default: Sequence[str] | None, card: ModelCard | None
) -> list[str]:
    file = root / "classes.txt"
    if file.is_file():
        # `0 sky`, `0: sky` and `sky` are all in use.
        lines = [re.sub(r"^\d+\s*[:,\s]\s*", "", line.strip()) for line in file.read_text().splitlines()]
        names = [line for line in lines if line]
        if not names:
            raise DeployError(f"{file} is empty; give one class name a line, in label order")
        return names
    if default:
        return list(default)
    if card is not None:
        return list(card.classes)
    # Without names: as many classes as the labels hold.
    highest = max(
        (int(values.max()) for _, path in pairs if (values := (x := read_labels(path))[x != IGNORE]).size),
        default=0,
    )
    return [f"class {index}" for index in range(max(highest + 1, 2))]


def _folder_pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    layouts = [
        (root / split, root / f"{split}annot"),
        (root / split, root / f"{split}_labels"),
        (root / split / "images", root / split / "labels"),
        (root / "images" / split, root / "labels" / split),
    ]
    for images, labels in layouts:
        if images.is_dir() and labels.is_dir():
            return _pair(images, labels)
    if (root / "images").is_dir() and (root / "labels").is_dir():
        pairs = _pair(root / "images", root / "labels")
        if split not in ("train", "val"):
            raise MisuseError(f"{root} has no split {split!r}; images/ + labels/ is divided into train and val")
        chosen = [pair for i, pair in enumerate(pairs) if (i % 10 == 9) == (split == "val")]
        if not chosen:
            raise MisuseError(f"{root} has {len(pairs)} images, too few to set every tenth apart as val")
        return chosen
    raise MisuseError(
        f"{root} has no labelled images for the split {split!r}; expected {split}/ with {split}annot/, "
        f"images/ with labels/, or VOC's ImageSets/Segmentation/{split}.txt"
    )


def _pair(images: Path, labels: Path) -> list[tuple[Path, Path]]:
    by_stem: dict[str, Path] = {}
    for file in sorted(file for file in labels.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES):
        if by_stem.setdefault(file.stem, file) != file:
            raise DeployError(f"{by_stem[file.stem]} and {file} are labels of one image; remove one")
    pairs = []
    for image in sorted(file for file in images.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES):
        if image.stem not in by_stem:
            raise DeployError(f"{image} has no label {labels / (image.stem + '.png')}; add it or move the image")
        pairs.append((image, by_stem[image.stem]))
    if not pairs:
        raise MisuseError(f"{images} holds no images; fill it or choose another split")
    if alone := sorted(by_stem.keys() - {image.stem for image, _ in pairs}):
        shown = ", ".join(by_stem[stem].name for stem in alone[:3]) + (", …" if len(alone) > 3 else "")
        log.warning("labels without an image are left out, %d in %s: %s", len(alone), labels, shown)
    return pairs


def _voc_pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    listing = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not listing.is_file():
        raise MisuseError(f"{listing} does not exist; choose a split that {listing.parent} lists")
    pairs = []
    for name in listing.read_text().split():
        image, label = root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png"
        for path in (image, label):
            if not path.is_file():
                raise DeployError(f"{listing} names {name}, but {path} does not exist")
        pairs.append((image, label))
    if not pairs:
        raise MisuseError(f"{listing} is empty; choose another split")
    return pairs
