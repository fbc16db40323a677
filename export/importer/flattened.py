"""Scores whose pixels were flattened, [N, H·W, K] or [N, K, H·W]: found, read as maps, and made maps in the graph."""

from collections.abc import Sequence

import numpy as np
from fcn_deploy.export.graph.index import GraphIndex
from fcn_deploy.export.importer.score_map import find_map_axes
from fcn_deploy.export.tolerances import STANDARD_FORM
from onnx import ModelProto

FACTORS = (1, 2, 4, 8, 16)  # of the image's size to that of the map that was flattened
SURE = 2  # up to which factor no Softmax is needed to tell scores from boxes
MOVES = frozenset(("Reshape", "Transpose", "Flatten", "Identity", "Squeeze", "Unsqueeze", "Cast"))
SOFTMAX = ("Softmax", "LogSoftmax")


def unflattened(result: np.ndarray, size: tuple[int, int], factor: int) -> np.ndarray:
    """A flattened result as the map [N,h,w,K] or [N,K,h,w] that it was."""
    height, width = (-(-side // factor) for side in size)
    if result.shape[1] == height * width:
        return result.reshape(len(result), height, width, result.shape[2])
    return result.reshape(len(result), result.shape[1], height, width)


def flattened_by(model: ModelProto, name: str, shape: Sequence[int], size: tuple[int, int]) -> int:
    """The factor of the map that an output of this shape is, flattened; 0 where it is none, as far as is seen."""
    if len(shape) != 3:
        return 0
    for factor in FACTORS:
        area = -(-size[0] // factor) * -(-size[1] // factor)
        if area > 1 and area in shape[1:] and (factor <= SURE or softmax_before(model, name) is not None):
            return factor
    return 0


def softmax_before(model: ModelProto, name: str) -> str | None:
    """The result of a Softmax that an output is, but for what moves its values; None: there is none."""
    index = GraphIndex(model)
    while (node := index.producer(name)) is not None and node.op_type in MOVES:
        name = node.input[0]
    return name if node is not None and node.op_type in SOFTMAX else None


def chain_to_map(model: ModelProto) -> tuple[list[str], str]:
    """(tensors that a model's output comes from by moves and one Softmax, the last first; that Softmax or "")."""
    index = GraphIndex(model)
    names, kind = [index.result], ""
    while (node := index.producer(names[-1])) is not None:
        if node.op_type in SOFTMAX and not kind:
            kind = node.op_type
        elif node.op_type not in MOVES:
            break
        names.append(node.input[0])
    return names, kind


def is_the_map(value: np.ndarray, result: np.ndarray, size: tuple[int, int], factor: int, kind: str) -> int | None:
    """The axis of the classes of a map [1,K,h,w] or [1,h,w,K] that a flattened result is; None: it is another.

    Args:
        value: of a tensor before the result.
        result: flattened, for one image.
        size: of the image.
        factor: by which the map is smaller.
        kind: of the Softmax between them, or "".
    """
    axes = find_map_axes(value.shape, size)
    if value.ndim != 4 or axes is None or axes.factor != factor:
        return None
    classes = 1 if axes.rows == 2 else 3
    wanted, found = np.moveaxis(value, classes, 1).astype(np.float64), unflattened(result, size, factor)
    if result.shape[1] == wanted.shape[2] * wanted.shape[3]:
        found = np.moveaxis(found, 3, 1)
    if kind:
        wanted = np.exp(wanted - wanted.max(1, keepdims=True))
        wanted /= wanted.sum(1, keepdims=True)
        wanted = np.log(wanted) if kind == "LogSoftmax" else wanted
    close = found.shape == wanted.shape and np.abs(found - wanted).max() <= STANDARD_FORM * (np.ptp(wanted) or 1.0)
    return classes if close else None
