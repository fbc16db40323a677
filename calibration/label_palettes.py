"""Label images with a palette: which class an index means where a PNG optimiser has renumbered them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fcn_deploy.calibration.metrics import IGNORE
from fcn_deploy.runtime.engine_format.model_card import voc_palette
from fcn_deploy.runtime.errors import DeployError
from numpy.typing import NDArray

Color = tuple[int, int, int]
BLACK_AND_WHITE = {0, 255}
VOC_COUNT = 21  # classes of Pascal VOC, whose colours voc_palette has


def labels_by_palette(
    indices: NDArray[Any], palette: NDArray[Any], colors: Sequence[Color] | None, path: Path
) -> NDArray[np.uint8] | None:
    """The labels that a palette image was made of, uint8 [H, W], where its palette was put into another order.

    None where its indices are the labels.

    Args:
        indices: [H, W] of integers, as stored.
        palette: [entries, 3] uint8.
        colors: of classes 0, 1, …; None: not known.
        path: of the file, for errors.

    Raises:
        DeployError: it cannot be told whether the colours or the indices are meant.
    """
    used = [int(index) for index in np.unique(indices)]
    if not used or used[-1] >= len(palette):
        return None
    shown: dict[int, Color] = {i: (int(palette[i][0]), int(palette[i][1]), int(palette[i][2])) for i in used}
    classes: dict[Color, list[int]] = {}
    for index, color in enumerate(colors or ()):
        classes.setdefault((color[0], color[1], color[2]), []).append(index)
    moved = [index for index, color in shown.items() if color in classes and index not in classes[color]]
    meant = None
    if all(red == green == blue for red, green, blue in shown.values()):
        meant = _by_greys({index: color[0] for index, color in shown.items()}, colors, moved)
    if meant is None and moved:
        meant = _by_colors(shown, classes, path, len(used) < len(palette))
    if meant is None:
        return None
    table = np.zeros(len(palette), np.uint8)
    table[used] = [meant[index] for index in used]
    labels: NDArray[np.uint8] = table[indices]
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


def _by_colors(
    shown: dict[int, Color], classes: dict[Color, list[int]], path: Path, padded: bool
) -> dict[int, int] | None:
    """Index → class of a palette whose entries are not where their class is; None where that means nothing.

    An optimiser of PNGs leaves no entry that is not used; a GIF or TIFF is `padded` with such (Pillow's quantize and
    GDAL's rgb2pct make them), and then all that are used are to be colours that somebody chose, of a class each.

    Raises:
        DeployError: it cannot be told whether the colours or the indices are meant.
    """
    colors = [color for _, color in sorted((index, color) for color, where in classes.items() for index in where)]
    chosen = tuple(colors) != voc_palette(len(colors)) or len(colors) == VOC_COUNT
    strange = next((color for index, color in shown.items() if color not in classes and index != IGNORE), None)
    repeated = len(set(shown.values())) < len(shown)  # as black, of entries that nobody set
    if ((strange is not None or padded) and not chosen) or (padded and (strange is not None or repeated)):
        return None  # colours that nobody chose, or some of them by chance
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
