"""How label files write the classes: their values or colours as labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from fcn_deploy.calibration.class_files import read_colors, twice
from fcn_deploy.calibration.label_files import StoredLabels, read_labels, say_once
from fcn_deploy.calibration.label_palettes import VOC_COUNT, Color
from fcn_deploy.calibration.mask_options import MaskOptions, class_of, parse_values
from fcn_deploy.calibration.metrics import IGNORE
from fcn_deploy.runtime.engine_format.model_card import ModelCard, voc_palette
from fcn_deploy.runtime.errors import DeployError, MisuseError
from numpy.typing import NDArray

VOC_BORDER = (224, 224, 192)
CHUNK = 1 << 20  # pixels
NO_CLASS = 65535  # of a colour, in a table of all


@dataclass(frozen=True)
class LabelMap:
    """How label files write the classes.

    Attributes:
        classes: names, in label order.
        colors: of the classes; by them a palette that was renumbered is told.
        void: a value that is not counted, beside 255; None: there is none.
        values: value → class, or IGNORE; None: a value is its class.
        table: colour → class, or IGNORE, of files with colours; None: nobody said.
        by_color: a palette's colours are the labels, and not its indices.
        places: class of the files → class of the model, which has the same in another order; None: the same order.
    """

    classes: Sequence[str]
    colors: Sequence[Color]
    void: int | None = None
    values: Mapping[int, int] | None = None
    table: Mapping[Color, int] | None = None
    by_color: bool = False
    places: Sequence[int] | None = None

    def read(self, path: Path) -> "ReadLabels":
        """The classes of a label file. Raises DeployError where it is none, or holds what is no class's."""
        stored = read_labels(path, self.colors, self.by_color)
        single = stored.single
        if stored.values.ndim == 3 and (single is None or self.by_color or self._has_greys(single)):
            return ReadLabels(self._by_color(stored, path))
        assert single is not None
        return self._by_value(stored, single, path)

    def name_of(self, label: int) -> str:
        """The name of a class of the model, or of the files where there is none."""
        return self.classes[label if self.places is None else self.places.index(label)]

    @cached_property
    def _greys(self) -> dict[int, int]:
        """Class by the value of a colour that is a grey."""
        return {red: label for (red, green, blue), label in (self.table or {}).items() if red == green == blue}

    @property
    def _named(self) -> Mapping[int, int] | None:
        """What the values of files of one channel are said to mean; None: a value is its class."""
        return self.values if self.values is not None else self._greys if self.by_color else None

    def _has_greys(self, values: NDArray[Any]) -> bool:
        return self.values is None and self._greys.keys() >= set(present_values(values))

    def _by_value(self, stored: StoredLabels, values: NDArray[Any], path: Path) -> "ReadLabels":
        present = present_values(values, stored.missing)
        meant = self._meant(present, stored.nodata)
        if any(meant[value] is None for value in present) and set(present) <= stored.shown.keys():
            shown = {value: stored.shown[value] for value in present}
            again = self._meant(list(shown.values()), stored.nodata) if self._named is not None else {}
            if again and None not in again.values():  # black and white, stored as 0 and 1
                meant = {value: again[grey] for value, grey in shown.items()}
        unknown = [value for value in present if meant[value] is None]
        if unknown:
            raise DeployError(self._of_no_class(unknown[0] if unknown[0] < 0 else unknown[-1], path))
        labels = _looked_up(values, {value: label for value, label in meant.items() if label is not None})
        if stored.missing is not None:
            values = values[stored.missing]
            hidden = self._meant(sorted(set(present_values(values)) - set(present)), stored.nodata)
            self._say_hidden([label for label in hidden.values() if label is not None], path)
            labels[stored.missing] = IGNORE
        nodata = stored.nodata if stored.nodata in meant and meant[stored.nodata] == IGNORE else None
        if nodata is not None and self._named is None and 0 <= nodata < len(self.classes) and nodata != self.void:
            name = self.classes[self._placed(nodata)]
            say_once(
                path,
                f"calls {nodata} no data by its own tag, so {name!r} is not counted where it is {nodata}; where it is "
                f"that class, say so: --mask-values {nodata}={name},…",
            )
        return ReadLabels(labels, frozenset(present), nodata)

    def _meant(self, present: Sequence[int], nodata: int | None) -> dict[int, int | None]:
        """Value → class or IGNORE; None: it means nothing."""
        meant: dict[int, int | None] = {}
        named = self._named
        for value in present:
            if named is not None and value in named:
                meant[value] = self._placed(named[value]) if named is self.values else named[value]
            elif value in (IGNORE, nodata) or (named is None and value == self.void):
                meant[value] = IGNORE
            else:
                meant[value] = self._placed(value) if named is None and 0 <= value < len(self.classes) else None
        return meant

    def _say_hidden(self, hidden: Sequence[int], path: Path) -> None:
        """Say of labels that a file has nowhere but where it is transparent, or masked: one may be a background."""
        if names := [self.classes[label] for label in hidden if label < len(self.classes)]:
            say_once(
                path,
                f"holds {names[0]!r} nowhere but where it is transparent, or masked, which is not counted; where it is "
                "that class, write labels without alpha",
            )

    def _placed(self, label: int) -> int:
        return label if self.places is None or label == IGNORE else self.places[label]

    def _of_no_class(self, value: int, path: Path) -> str:
        if path.suffix.lower() in (".jpg", ".jpeg", ".jpe"):
            return f"{path} holds value {value}, which is no class's: JPEG changes values; write labels as PNG or TIFF"
        if self.values is not None:
            return (
                f"{path} holds value {value}, which --mask-values does not name; add {value}=CLASS to it, or "
                f"{value}=void"
            )
        if self.by_color:
            return f"{path} holds value {value}, a grey of no class; add it to the colours, or as void"
        count = len(self.classes)
        return (
            f"{path} holds class {value}, and there are {count} classes (0 to {count - 1}; {IGNORE} is ignored); mend "
            "the label, name more classes in classes.txt, or say what values mean: --mask-values VALUE=CLASS,…"
        )

    def _by_color(self, stored: StoredLabels, path: Path) -> NDArray[np.uint8]:
        if self.table is None:
            raise DeployError(
                f"{path} has colours, and nobody said of which class each is; pass --mask-colors FILE with a line "
                "`NAME R G B` for each class, or write class indices in one channel"
            )
        red, green, blue = (stored.values[:, :, band] for band in range(3))
        codes = red.astype(np.uint32) << 16 | green.astype(np.uint32) << 8 | blue
        labels = self._all_colors[codes]
        if stored.nodata is not None and 0 <= stored.nodata <= IGNORE:
            self._leave_out(labels, codes, stored.nodata, path)
        if stored.missing is not None:
            hidden = set(present_values(labels[stored.missing])) - set(present_values(labels[~stored.missing]))
            self._say_hidden(sorted(hidden), path)
            labels[stored.missing] = IGNORE
        strange = labels == NO_CLASS
        if strange.any():
            code = int(codes[strange][0])
            color = (code >> 16, code >> 8 & 255, code & 255)
            lossy = path.suffix.lower() in (".jpg", ".jpeg", ".jpe")
            remedy = "JPEG changes colours; write labels as PNG" if lossy else "say what it is by --mask-colors FILE"
            raise DeployError(f"{path} has the colour {color} in {int(strange.sum())} pixels, of no class; {remedy}")
        found: NDArray[np.uint8] = labels.astype(np.uint8)
        return found

    def _leave_out(self, labels: NDArray[np.uint16], codes: NDArray[np.uint32], nodata: int, path: Path) -> None:
        """Mark where all bands have the no-data value, unless the user has said what that colour is."""
        code = nodata << 16 | nodata << 8 | nodata
        label = int(self._all_colors[code])
        if (self.by_color and label != NO_CLASS) or not (where := codes == code).any():
            return
        labels[where] = IGNORE
        if label < len(self.classes):
            say_once(
                path,
                f"calls {nodata} no data by its own tag, so {self.classes[label]!r} is not counted where it is that in "
                "all bands; where it is that class, say so by --mask-colors FILE",
            )

    @cached_property
    def _all_colors(self) -> NDArray[np.uint16]:
        """Class by colour, R·65536 + G·256 + B."""
        labels = np.full(1 << 24, NO_CLASS, np.uint16)
        for (red, green, blue), label in (self.table or {}).items():
            labels[red << 16 | green << 8 | blue] = label
        return labels


@dataclass(frozen=True)
class ReadLabels:
    """A label file, read.

    Attributes:
        labels: [H, W] uint8: classes, and IGNORE where there is none.
        values: that the file holds, where it has one channel.
        nodata: the value that its tag says is no label, where that was believed.
    """

    labels: NDArray[np.uint8]
    values: frozenset[int] = frozenset()
    nodata: int | None = None


def label_map_of(
    classes: Sequence[str],
    colors: Sequence[Color],
    masks: MaskOptions,
    *,
    chosen: Mapping[str, Color] | None = None,
    void: int | None = None,
) -> LabelMap:
    """How label files write `classes`.

    Args:
        classes, colors: in label order.
        masks: what the user says.
        chosen: colours by name, of a file that names the classes; void ones may be among them.
        void: a value that is not counted.

    Raises:
        MisuseError: what the user says contradicts itself or the classes.
        DeployError: a damaged file of colours.
    """
    values = parse_values(masks.values, classes)[0] if masks.values is not None else None
    table: dict[Color, int] | None = None
    if masks.colors is not None:
        table = _table(read_colors(masks.colors), classes, masks.colors)
    elif chosen:
        table = {color: class_of(name, classes) for name, color in chosen.items()}
    elif tuple(colors) != voc_palette(len(colors)) or len(colors) == VOC_COUNT:
        unique = len(set(colors)) == len(colors)
        table = {(c[0], c[1], c[2]): index for index, c in enumerate(colors)} if unique else None
        if table is not None and len(colors) == VOC_COUNT:
            table.setdefault(VOC_BORDER, IGNORE)
    return LabelMap(classes, colors, void, values, table, masks.colors is not None)


def reordered(label_map: LabelMap, names: Sequence[str], masks: MaskOptions) -> LabelMap:
    """A map to a model's classes, for files whose values are of the same classes in another order, that of `names`."""
    lower = [name.lower() for name in label_map.classes]
    places = [lower.index(name.lower()) for name in names]
    values = parse_values(masks.values, names)[0] if masks.values is not None else None
    colors = [label_map.colors[place] for place in places]
    return replace(label_map, classes=tuple(names), colors=colors, values=values, places=places)


def label_map_for(card: ModelCard, masks: MaskOptions) -> LabelMap:
    """How label files write the classes of a model; the value after the last class is void."""
    return label_map_of(card.classes, card.colors, masks, void=len(card.classes))


def _table(pairs: Sequence[tuple[str, Color]], classes: Sequence[str], path: Path) -> dict[Color, int]:
    """Colour → class or IGNORE. Raises MisuseError for an unknown class, or one that has two colours."""
    table = {color: class_of(name, classes, str(path)) for name, color in pairs}
    if again := twice([label for label in table.values() if label != IGNORE]):
        raise MisuseError(f"{path} names {classes[again[0]]!r} twice; a class has one colour")
    return table


def present_values(values: NDArray[Any], missing: NDArray[np.bool_] | None = None) -> list[int]:
    """The values that occur, in order; of those without a label, none."""
    if missing is not None:
        values = values[~missing]
    if values.dtype in (np.uint8, np.uint16):
        seen, flat = np.zeros(np.iinfo(values.dtype).max + 1, bool), values.ravel()
        for start in range(0, flat.size, CHUNK):  # indices are copied as 64-bit numbers
            seen[flat[start : start + CHUNK]] = True
        return [int(value) for value in np.flatnonzero(seen)]
    return [int(value) for value in np.unique(values)]


def _looked_up(values: NDArray[Any], meant: Mapping[int, int]) -> NDArray[np.uint8]:
    """Each value's label, uint8; IGNORE where there is none."""
    if values.dtype == np.uint8 and all(value == label for value, label in meant.items()):
        return values.copy()
    if values.dtype in (np.uint8, np.uint16):
        table = np.full(np.iinfo(values.dtype).max + 1, IGNORE, np.uint8)
        table[list(meant)] = list(meant.values())
        direct: NDArray[np.uint8] = table[values]
        return direct
    labels = np.full(values.shape, IGNORE, np.uint8)
    for value, label in meant.items():
        labels[values == value] = label
    return labels
