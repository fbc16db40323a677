"""Labelled images: folders of pairs, the Pascal VOC layout, and the generated `digits`."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from fcn_deploy.calibration.census import Census
from fcn_deploy.calibration.class_files import VOID_NAMES, in_label_order, read_classes, read_colors, twice
from fcn_deploy.calibration.digits import Digits
from fcn_deploy.calibration.label_files import find_label_files, read_labels, say_once
from fcn_deploy.calibration.label_map import LabelMap, ReadLabels, label_map_of, present_values, reordered
from fcn_deploy.calibration.label_palettes import Color
from fcn_deploy.calibration.mask_options import MaskOptions, names_said
from fcn_deploy.calibration.metrics import IGNORE
from fcn_deploy.runtime.arrays import ImageSource
from fcn_deploy.runtime.engine_format.model_card import ModelCard, voc_palette
from fcn_deploy.runtime.errors import DeployError, MisuseError
from fcn_deploy.runtime.images.find import IMAGE_SUFFIXES, unread_files
from fcn_deploy.runtime.images.georeference import FAR, distance, transform_in
from fcn_deploy.runtime.images.header import read_header
from fcn_deploy.runtime.images.numbers import COMMON, ReadOptions
from fcn_deploy.runtime.images.read import decode, may_have_no_data
from fcn_deploy.runtime.images.regions import REGION_PIXELS, open_regions
from fcn_deploy.runtime.pixels.no_data import Invalid, filled

log = logging.getLogger(__name__)

MOST_UNNAMED = 48  # classes that are believed without names
FEW_UNNAMED = 8  # likewise, where each label file has other numbers, from 0 on without a gap
MOST_GAPS = 2  # how many times more classes than values without names there may be

CLASS_FILES = ("classes.txt", "labelmap.txt")  # the second is CVAT's
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
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
        label_map: how the label files write the classes.
        card: how images are read; None: 8-bit RGB.
        reading: what their numbers mean.
    """

    pairs: tuple[tuple[Path, Path], ...]
    classes: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    label_map: LabelMap
    card: ModelCard | None = None
    reading: ReadOptions = field(default_factory=lambda: COMMON)

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return self.pairs[index][0].name

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, invalid = filled(self.image(index), self._card)
        return image, self._labels(index, image.shape[:2], invalid).labels

    @contextmanager
    def source(self, index: int) -> Iterator[tuple[ImageSource, np.ndarray]]:
        """`self[index]`, of which a large image is read where it is asked for; MaskedArrays where there is no data."""
        header = read_header(self.pairs[index][0])
        labels = self._labels(index, header.size, None).labels
        if header.pixels <= REGION_PIXELS:
            yield decode(header, self._card, self.reading), labels
            return
        with open_regions(header.path, self._card, self.reading) as image:
            yield image, labels

    def image(self, index: int) -> np.ndarray:
        """The image of `self[index]` without its labels; a MaskedArray where there is no data."""
        return decode(read_header(self.pairs[index][0]), self._card, self.reading)

    def labels(self, index: int) -> ReadLabels:
        """The labels of `self[index]`, checked likewise; the image is read only where some of it may be no data."""
        header = read_header(self.pairs[index][0])
        invalid = None
        if may_have_no_data(header, self._card, self.reading):
            invalid = filled(decode(header, self._card, self.reading), self._card)[1]
        return self._labels(index, header.size, invalid)

    @property
    def _card(self) -> ModelCard:
        return self.card or ModelCard(self.classes)

    def _labels(self, index: int, size: tuple[int, int], invalid: Invalid | None) -> ReadLabels:
        image_path, label_path = self.pairs[index]
        read = self.label_map.read(label_path)
        if read.labels.shape != size:
            raise DeployError(
                f"{label_path} is {read.labels.shape[0]}×{read.labels.shape[1]} and {image_path} is {size[0]}×"
                f"{size[1]}; labels must have their image's size (an EXIF rotation counts)"
            )
        _name_where_apart(image_path, label_path, size)
        if invalid is None:
            return read
        labels = np.where(invalid, np.uint8(IGNORE), read.labels)  # what is no image is not counted
        return replace(read, labels=labels)


def _name_where_apart(image: Path, label: Path, size: tuple[int, int]) -> None:
    """Say of a label that it lies elsewhere than its image, as both say, so that it is of other ground."""
    places = transform_in(image), transform_in(label)
    if places[0] is None or places[1] is None or not (apart := distance(places[1], places[0], size)) > FAR:
        return
    say_once(
        label,
        f"lies elsewhere than {image.name}, by {apart:.3g} pixels at a corner, as both files say, and pixels are "
        "compared one by one: warp it onto the image (gdalwarp), or mend the tags",
    )


def take_census(data: LabelledImages, where: str, enough: int | None = None) -> Census:
    """What the labels of a collection hold.

    Reading all labels is also the check, before hours of training, that they fit their images and the classes.

    Args:
        data: the collection.
        where: its name in errors.
        enough: stop when so many classes have been met.

    Raises:
        DeployError: a label that is missing or damaged, of another size than its image, or holds an unknown class.
        MisuseError: it cannot be told what the values mean.
    """
    census = Census(np.zeros(len(data.classes), np.int64))
    for index in range(len(data)):
        if isinstance(data, FilePairs):
            census.add(data.labels(index), data.pairs[index][1])
        else:
            census.count(data[index][1])
        if enough is not None and len(census.present) >= enough:
            break
    if isinstance(data, FilePairs):
        census.check(data.label_map, where)
    return census


def look_at_values(data: LabelledImages) -> None:
    """Look at the values of all images of a collection, before hours of training: what looks wrong is named.

    Raises:
        DoubtfulError: with its `reading.strict`, values that do not look like the card's.
        DeployError: an image that is damaged, or of a kind that the card does not allow.
    """
    if isinstance(data, FilePairs):
        for path, _ in data.pairs:
            with open_regions(path, data._card, data.reading):
                pass


def class_pixels(data: LabelledImages) -> np.ndarray:
    """Counted pixels of each class in a collection, int64 [classes]. Raises what `take_census` does."""
    return take_census(data, "the data").pixels


def load_dataset(
    data: str,
    split: str,
    *,
    seed: int = 0,
    count: int | None = None,
    card: ModelCard | None = None,
    masks: MaskOptions = MaskOptions(),  # noqa: B008 (frozen)
    reading: ReadOptions = COMMON,
    class_file: Path | None = None,
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
        masks: what the values or colours of label files mean.
        reading: what the numbers of images mean.
        class_file: in the place of classes.txt.

    Names of classes come from classes.txt or CVAT's labelmap.txt, one a line and with a colour where there is one; a
    last one called void is not counted. Without them they are Pascal VOC's in its layout (unless the card or `masks`
    say others), of the card, or of what `masks` says.

    Raises:
        MisuseError: no such data or split.
        DeployError: images without labels, or a damaged list.
    """
    if data == "digits":
        if split not in ("train", "val"):
            raise MisuseError(f"digits has no split {split!r}; choose train or val")
        if masks:
            raise MisuseError("--mask-values and --mask-colors are of label files, and digits are drawn: omit them")
        if class_file is not None or reading.input_range is not None or reading.no_data is not None:
            raise MisuseError("--class-file, --input-range and --nodata are of files, and digits are drawn: omit them")
        return Digits(split, seed, count)
    root = Path(data)
    if not root.is_dir():
        raise MisuseError(f"{data} is not a folder; --data takes digits or a folder of labelled images")
    voc = (root / "ImageSets" / "Segmentation").is_dir()
    pairs = _voc_pairs(root, split) if voc else _folder_pairs(root, split)
    if count is not None and count < len(pairs):
        pairs = [pairs[i] for i in np.linspace(0, len(pairs) - 1, count).round().astype(int)]
    listed = class_file or next((root / name for name in CLASS_FILES if (root / name).is_file()), root / CLASS_FILES[0])
    may_be_vocs = voc and (card is None or len(card.classes) == len(VOC_CLASSES))
    names, chosen = _classes(listed, pairs, VOC_CLASSES if may_be_vocs else None, card, masks)
    void = None
    if names[-1].lower() in VOID_NAMES:
        void, names = len(names) - 1, names[:-1]
    if card is not None:
        if len(names) != len(card.classes):
            raise MisuseError(
                f"{data} has {len(names)} classes and the model has {len(card.classes)}; use data with the "
                "classes the model was trained on"
            )
        known = {name.lower() for name in card.classes}
        if file_names := [name for name in names if name.lower() not in known]:
            log.warning("%s names its classes otherwise than the model: %s", data, ", ".join(file_names[:3]))
    if len(names) > IGNORE:
        raise MisuseError(f"{data} has {len(names)} classes; labelled data has at most {IGNORE}")
    if card is None:
        colors = tuple(_colors(names, chosen))
        own = label_map_of(names, colors, masks, chosen=chosen, void=void)
        return FilePairs(tuple(pairs), tuple(names), colors, own, None, reading)
    label_map = _model_label_map(data, names, card, masks, chosen, void)
    return FilePairs(tuple(pairs), card.classes, tuple(card.colors), label_map, card, reading)


def _model_label_map(
    data: str,
    names: Sequence[str],
    card: ModelCard,
    masks: MaskOptions,
    chosen: Mapping[str, Color],
    void: int | None,
) -> LabelMap:
    """How label files of classes `names`, with the colours `chosen` of some, write the classes of a model."""
    given = {name.lower(): color for name, color in chosen.items()}  # of the files, whatever the model's are
    colors = [given.get(name.lower(), color) for name, color in zip(card.classes, card.colors, strict=True)]
    if not _another_order(names, card.classes):
        return label_map_of(names, colors, masks, chosen=chosen, void=void)
    log.warning("%s has the model's classes in another order, by which its labels are taken: by their names", data)
    own = label_map_of(card.classes, colors, replace(masks, values=None), chosen=chosen, void=void)
    return reordered(own, names, masks)


def _classes(
    file: Path,
    pairs: Sequence[tuple[Path, Path]],
    default: Sequence[str] | None,
    card: ModelCard | None,
    masks: MaskOptions,
) -> tuple[list[str], dict[str, Color]]:
    """The names of the classes, a void one perhaps the last, and the colours that a file gives them.

    `file` is one of classes, which need not be there if it is called classes.txt.
    """
    said = {} if masks.colors is None else dict(read_colors(masks.colors))
    if file.is_file() or file.name != "classes.txt":
        listed = read_classes(file) if masks.values is not None else in_label_order(read_classes(file), file)
        _check_names(file, [each.name for each in listed], masks)
        colors = {each.name: each.color for each in listed if each.color is not None}
        if again := twice(list(colors.values())):
            raise DeployError(f"{file} has the colour {again[0]} twice; give each class its own")
        return [each.name for each in listed], colors | said
    own = list(said) or ([] if masks.values is None else list(names_said(masks.values)))
    if default and {name.lower() for name in own} - set(VOID_NAMES) <= {name.lower() for name in default}:
        if card is None:
            log.warning("%s is not there, so classes are taken for the %d of Pascal VOC", file, len(default))
        return list(default), said
    if card is not None:
        return list(card.classes), said
    if said:
        return [name for name in said if name.lower() not in VOID_NAMES], said
    if own:
        return own, {}
    return _counted_classes(file, pairs), {}


def _check_names(file: Path, names: Sequence[str], masks: MaskOptions) -> None:
    """Raise where the names of a file are none, or cannot be those of labels in their order."""
    if not names:
        raise DeployError(f"{file} is empty; give one class name a line, in label order")
    if again := twice(names):
        raise DeployError(f"{file} names {again[0]!r} twice; give each class a name of its own")
    early = next((index for index, name in enumerate(names[:-1]) if name.lower() in VOID_NAMES), None)
    if early is not None and masks.values is None:
        other = next(index for index in range(len(names)) if index != early)
        raise MisuseError(
            f"{file} names {names[early]!r} as label {early}, and only the last one may be void; pass --mask-values "
            f"{early}=void,{other}={names[other]},…, or where labels are colours --mask-colors {file} alone"
        )


def _another_order(names: Sequence[str], classes: Sequence[str]) -> bool:
    """Whether names are those of a model's classes, each once, but not in its order."""
    mine, theirs = ([name.lower() for name in each] for each in (names, classes))
    return mine != theirs and sorted(mine) == sorted(theirs) and len(set(theirs)) == len(theirs)


def _counted_classes(file: Path, pairs: Sequence[tuple[Path, Path]]) -> list[str]:
    """Without names: as many classes as the labels hold."""
    values: set[int] = set()
    runs = set()  # the largest value of each file that holds all below it, as files of numbered objects do
    for _, path in pairs:
        stored = read_labels(path)
        single = stored.single
        if single is None:
            raise DeployError(
                f"{path} has colours, and nobody said of which class each is; pass --mask-colors FILE with a line "
                "`NAME R G B` for each class, or write class indices in one channel"
            )
        found = set(present_values(single, stored.missing))
        runs.add(max(found, default=0) if found == set(range(len(found))) else None)
        values |= found - {IGNORE, stored.nodata}
    count = max(max(values, default=0) + 1, 2)
    if count > MOST_GAPS * max(len(values), 1) or min(values, default=0) < 0:
        listed = sorted(values)
        few = ",".join(f"{value}=CLASS" for value in listed[:6]) + (",…" if len(listed) > 6 else "")
        raise MisuseError(
            f"the labels of {file.parent} hold {len(values)} values from {listed[0]} to {listed[-1]}, and nobody said "
            f"what they mean; pass --mask-values {few}, or name all classes in {file}"
        )
    if len(values) > MOST_UNNAMED or (count > FEW_UNNAMED and None not in runs and len(runs) > 1):
        raise MisuseError(
            f"the labels of {file.parent} hold {len(values)} values to {count - 1}, as those of numbered objects do, "
            f"and nobody said that they are classes; name these in {file}, or write labels of classes"
        )
    return [f"class {index}" for index in range(count)]


def _colors(names: Sequence[str], chosen: Mapping[str, Color]) -> list[Color]:
    """A colour for each class: one that a file gives it, CamVid's, or the palette's."""
    known = CAMVID_COLORS | {name.lower(): color for name, color in chosen.items()}
    palette = voc_palette(len(names))
    return [known.get(name.lower(), palette[index]) for index, name in enumerate(names)]


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
    by_stem = find_label_files(labels)
    pairs = []
    for image in sorted(file for file in images.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES):
        if image.stem not in by_stem:
            raise DeployError(f"{image} has no label {labels / (image.stem + '.png')}; add it or move the image")
        pairs.append((image, by_stem[image.stem]))
    unread = unread_files(str(images), sorted(images.iterdir()), IMAGE_SUFFIXES)
    if not pairs:
        raise MisuseError(unread or f"{images} holds no images; fill it or choose another split")
    if unread:
        log.warning(unread)
    if alone := sorted(by_stem.keys() - {image.stem for image, _ in pairs}):
        shown = ", ".join(by_stem[stem].name for stem in alone[:3]) + (", …" if len(alone) > 3 else "")
        log.warning("labels without an image are left out, %d in %s: %s", len(alone), labels, shown)
    return pairs


def _voc_pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    listing = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not listing.is_file():
        raise MisuseError(f"{listing} does not exist; choose a split that {listing.parent} lists")
    pairs = []
    folders = root / "JPEGImages", root / "SegmentationClass"
    files = [find_label_files(folder) if folder.is_dir() else {} for folder in folders]  # of any kind that is read
    for name in listing.read_text().split():
        for folder, known, usual in zip(folders, files, (".jpg", ".png"), strict=True):
            if name not in known:
                raise DeployError(f"{listing} names {name}, but {folder / (name + usual)} does not exist")
        pairs.append((files[0][name], files[1][name]))
    if not pairs:
        raise MisuseError(f"{listing} is empty; choose another split")
    return pairs
