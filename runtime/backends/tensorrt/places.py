"""Where pixels of the labels lie in the scores, as kernels.cu reads it: a table of rows and columns, once per size."""

import numpy as np

from ...arrays import AnyArray
from ...engine_format.stage import Upsampling
from ...head.resize_axis import Axis, axis_of

# Of a row or a column: two cells, and a weight for each.
PLACE = np.dtype([("first", np.int32), ("second", np.int32), ("near", np.float32), ("far", np.float32)])


def places(upsampling: Upsampling, cells: tuple[int, int], padded: tuple[int, int]) -> tuple[AnyArray, bool]:
    """Where the rows of a padded image lie in its scores, and after them the columns: PLACE [H + W].

    And whether pixels are summed up as where every cell holds equally many; `labels_from_scores` has two orders.
    """
    if upsampling.mode == "none":
        ends = [np.minimum(np.arange(side), total - 1) for side, total in zip(padded, cells, strict=True)]
        axes = [Axis(end, end, np.zeros(len(end), np.float32)) for end in ends]
    else:
        axes = [axis_of(upsampling, axis, cells[axis], padded[axis], 0, padded[axis]) for axis in (0, 1)]
    uniform = [axis.uniform for axis in axes]
    even = all(uniform)
    found = np.empty(sum(padded), PLACE)
    for axis, total, part in zip(axes, cells, (found[: padded[0]], found[padded[0] :]), strict=True):
        if even and axis.uniform is not None:
            which, inside = np.divmod(np.arange(len(part)) - axis.uniform.offset, axis.uniform.factor)
            first, second = (np.clip(which + step, 0, total - 1) for step in (0, 1))
            near, far = axis.uniform.weights[:, inside]
        else:
            first, second, near, far = axis.first, axis.second, 1 - axis.weight, axis.weight
        for name, values in zip(PLACE.names or (), (first, second, near, far), strict=True):
            part[name] = values
    return found, even
