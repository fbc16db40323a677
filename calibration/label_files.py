"""Class indices from label files: what was stored, whatever a viewer or an optimiser makes of it."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from fcn_deploy.calibration.metrics import IGNORE
from fcn_deploy.runtime.errors import DeployError
from fcn_deploy.runtime.images.header import DEFAULT_MAX_PIXELS
from fcn_deploy.runtime.images.pillow import open_pillow
from fcn_deploy.runtime.model_card import voc_palette
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image as Pictures

log = logging.getLogger(__name__)

Color = tuple[int, int, int]
MINISWHITE = 0  # of a TIFF's PhotometricInterpretation
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of a TIFF
BLACK_AND_WHITE = {0, 255}
VOC_COUNT = 21  # classes of Pascal VOC, whose colours voc_palette has
_said: set[Path] = set()  # folders of which a renumbered palette was told
FULL = 255  # what the largest value of fewer than 8 bits is read as


def read_labels(path: Path, colors: Sequence[Color] | None = None) -> NDArray[Any]:
    """Class indices, [H, W] uint8 or uint16, from a one-channel or palette image.

    Of fewer than 8 bits a value they are what is stored, which Pillow would stretch to 0..255. Of a TIFF whose 0 is
    white they are inverted, as images are. A palette may have been renumbered by a PNG optimiser, which keeps what is
    shown: one of greys is then the labels, and one of the classes' colours in another order tells the classes.

    Args:
        path: of the file.
        colors: of classes 0, 1, …; None: not known, and palettes of colours are believed as they are.

    Raises:
        DeployError: not a label image, damaged, or with colours from which the classes cannot be told.
    """
    try:
        with open_pillow(path, DEFAULT_MAX_PIXELS) as picture:
            if picture.mode not in ("L", "P", "1", "I", "I;16"):
                raise DeployError(
                    f"{path} has colours ({picture.mode}); labels are class indices in one channel or a palette"
                )
            labels = _stored(picture, path)
            palette = picture.getpalette() if picture.mode == "P" else None
    except DeployError:
        raise
    except FileNotFoundError as error:
        raise DeployError(f"{path} does not exist; every image needs a label of the same name") from error
    except Exception as error:
        raise DeployError(f"cannot read {path} as labels: {error}; is it damaged or truncated?") from error
    if palette is not None:
        return _by_palette(labels, np.array(palette, np.uint8).reshape(-1, 3), colors, path)
    return labels


def _stored(picture: "Pictures.Image", path: Path) -> NDArray[Any]:
    """The values of a grey or palette image as its file stores them, uint8 or uint16."""
    largest = _largest(picture, path)  # while the file is not decoded yet
    values: NDArray[Any] = np.asarray(picture)
    if picture.mode == "I":
        if values.size and values.min() < 0:
            raise DeployError(f"{path} holds class {values.min()}; classes count from 0, and {IGNORE} is ignored")
        values = np.clip(values, 0, 65535).astype(np.uint16)
    if picture.mode == "1":
        return values.astype(np.uint8)
    if picture.mode == "L" and largest < FULL:
        return np.rint(values * (largest / FULL)).astype(np.uint8)
    if picture.mode == "I" and picture.format == "PPM" and largest < 65535:
        return np.rint(values * (largest / 65535)).astype(np.uint16)
    if picture.mode == "I;16" and _photometric(picture) == MINISWHITE:  # others are inverted by Pillow
        return np.uint16(largest) - values.astype(np.uint16)
    return values


def _largest(picture: Any, path: Path) -> int:
    """The largest value that a sample of a grey image can have in its file."""
    bits = 8
    if picture.format == "PNG":
        with path.open("rb") as file:
            bits = file.read(25)[24]  # behind signature, length, name, width and height
    elif picture.format == "TIFF":
        bits = _tag(picture, BITS_PER_SAMPLE, (1,))[0]
    elif picture.format == "PPM":
        codec, arguments = picture.tile[0][0], picture.tile[0][3]
        return arguments[1] if codec.startswith("ppm") else FULL  # others have no MAXVAL of their own
    return int((1 << bits) - 1)


def _photometric(picture: "Pictures.Image") -> int | None:
    return _tag(picture, PHOTOMETRIC, None) if picture.format == "TIFF" else None


def _tag(picture: Any, tag: int, default: Any) -> Any:
    return picture.tag_v2.get(tag, default)


def _by_palette(
    indices: NDArray[Any], palette: NDArray[Any], colors: Sequence[Color] | None, path: Path
) -> NDArray[Any]:
    """The labels that a palette image was made of, where its palette was put into another order; else its indices."""
    used = [int(index) for index in np.unique(indices)]
    if not used or used[-1] >= len(palette):
        return indices
    shown: dict[int, Color] = {i: (int(palette[i][0]), int(palette[i][1]), int(palette[i][2])) for i in used}
    classes: dict[Color, list[int]] = {}
    for index, color in enumerate(colors or ()):
        classes.setdefault((color[0], color[1], color[2]), []).append(index)
    moved = [index for index, color in shown.items() if color in classes and index not in classes[color]]
    meant = None
    if all(red == green == blue for red, green, blue in shown.values()):
        meant = _by_greys({index: color[0] for index, color in shown.items()}, colors, moved)
    if meant is None and moved and len(used) == len(palette):  # an optimiser leaves no entry that is not used
        meant = _by_colors(shown, classes, path)
    if meant is None:
        return indices
    _say_once(path)
    table = np.zeros(len(palette), np.uint8)
    table[used] = [meant[index] for index in used]
    labels: NDArray[Any] = table[indices]
    return labels


def _by_greys(greys: dict[int, int], colors: Sequence[Color] | None, moved: Sequence[int]) -> dict[int, int] | None:
    """Index → label of a palette of greys; None where its indices are the labels."""
    if all(index == grey for index, grey in greys.items()) or set(greys.values()) <= BLACK_AND_WHITE:
        return None  # black and white are how a mask of 0 and 1 is shown
    if colors is None:
        return greys
    in_place = not moved and any(tuple(colors[i]) == (grey,) * 3 for i, grey in greys.items() if i and i < len(colors))
    fits = all(grey <= len(colors) or grey == IGNORE for grey in greys.values())  # one more: a void class
    return greys if fits and not in_place else None


def _by_colors(shown: dict[int, Color], classes: dict[Color, list[int]], path: Path) -> dict[int, int] | None:
    """Index → class of a palette whose entries are not where their class is; None where that means nothing.

    Raises:
        DeployError: it cannot be told whether the colours or the indices are meant.
    """
    colors = [color for _, color in sorted((index, color) for color, where in classes.items() for index in where)]
    chosen = tuple(colors) != voc_palette(len(colors)) or len(colors) == VOC_COUNT
    strange = next((color for index, color in shown.items() if color not in classes and index != IGNORE), None)
    if strange is not None and not chosen:
        return None  # colours that nobody chose, and some of them by chance
    why = ""
    if strange is not None:
        why = f"one, {strange}, is of no class"
    elif twice := next((color for color in shown.values() if len(classes.get(color, ())) > 1), None):
        why = f"classes {' and '.join(map(str, classes[twice]))} are both {twice}"
    elif not chosen:
        why = "nobody said what colours the classes have"
    if why:
        raise DeployError(
            f"{path} has the classes' colours in another order, as PNG optimisers leave them, and {why}; write the "
            "labels again as one channel of grey"
        )
    return {index: classes[color][0] if color in classes else IGNORE for index, color in shown.items()}


def _say_once(path: Path) -> None:
    """For each folder, by its first file."""
    if path.parent not in _said:
        _said.add(path.parent)
        log.warning("%s has its palette in another order; labels are told by their colours, not by their index", path)
