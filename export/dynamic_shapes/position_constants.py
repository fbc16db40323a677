"""Position constants: a value for each place of a map; their law at other sizes, where it can be seen."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from fcn_deploy.export.dynamic_shapes.shape_writer import ShapeWriter
from fcn_deploy.export.dynamic_shapes.sizes import SampledSize
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError
from fcn_deploy.export.tolerances import POSITION_CONSTANT
from onnx import NodeProto, helper


@dataclass(frozen=True)
class Ramp:
    """Values along an axis of n places: at place i, over_n / n + step · i / (n - less), `less` None: step · i."""

    over_n: np.ndarray
    step: np.ndarray
    less: int | None


@dataclass(frozen=True)
class PositionLaw:
    """A constant as a sum: `base`, and a ramp along each of some axes; `description`: of the ramps."""

    base: np.ndarray
    ramps: dict[int, Ramp]
    description: str

    def write(self, writer: ShapeWriter, node: NodeProto, sides: Mapping[int, SampledSize]) -> str:
        """The constant at every size, as nodes before `node`; `sides`: the axes that grow, and with what."""
        total = writer.constant("base", self.base)
        for place, ramp in self.ramps.items():
            total = writer.node("Add", [total, self._write_ramp(writer, writer.size(sides[place], node), place, ramp)])
        return total

    def _write_ramp(self, writer: ShapeWriter, size: str, place: int, ramp: Ramp) -> str:
        """`size`: how many places there are, as a list of one."""
        dtype = helper.np_dtype_to_tensor_dtype(self.base.dtype)
        count = writer.node("Cast", [size], to=dtype)
        scalar = writer.node("Reshape", [size, writer.constant("scalar", np.zeros(0, np.int64))])
        zero, one = (writer.constant(text, np.array(number, np.int64)) for text, number in (("zero", 0), ("one", 1)))
        steps = writer.node("Cast", [writer.node("Range", [zero, scalar, one])], to=dtype)
        line = [-1 if axis == place else 1 for axis in range(self.base.ndim)]
        steps = writer.node("Reshape", [steps, writer.constant("line", np.array(line, np.int64))])
        if ramp.less is not None:
            # One place has nothing to divide by, and starts at 0.
            under = writer.node("Sub", [size, writer.constant("less", np.array([ramp.less], np.int64))])
            least = writer.constant("least", np.array([1], np.int64))
            over = writer.node("Where", [writer.node("Greater", [under, least]), under, least])
            steps = writer.node("Div", [steps, writer.node("Cast", [over], to=dtype)])
        part = writer.node("Mul", [steps, writer.constant("step", ramp.step)])
        if ramp.over_n.any():
            first = writer.node("Div", [writer.constant("first", ramp.over_n), count])
            part = writer.node("Add", [part, first])
        return part


def find_law(node: NodeProto, array: np.ndarray, sides: Mapping[int, SampledSize]) -> PositionLaw:
    """The law of a constant along the axes that grow, `sides`: axis → with what.

    Raises:
        ConflictError: it is no constant, grid or ramp along them.
    """
    first = tuple(slice(0, 1) if place in sides else slice(None) for place in range(array.ndim))
    base, ramps = array[first].copy(), {}
    rebuilt = array[first].astype(np.float64)
    described = []
    for place, size in sides.items():
        count = size[0]
        if count == 1:
            continue
        along = tuple(slice(None) if other == place else part for other, part in enumerate(first))
        line = array[along].astype(np.float64)
        start, end = (np.take(line, [at], axis=place) for at in (0, count - 1))
        step = (end - start) / (count - 1)
        if not step.any():
            continue
        found = _Line(start, step, count).ramp() if array.dtype.kind == "f" or (step % 1 == 0).all() else None
        if found is None or count < 3:
            raise _belongs(node, array)
        ramp, text = found
        index = np.arange(count).reshape([-1 if other == place else 1 for other in range(array.ndim)])
        rebuilt = rebuilt + step * index
        base = base - (ramp.over_n / count).astype(array.dtype)
        ramps[place] = Ramp(ramp.over_n.astype(array.dtype), ramp.step.astype(array.dtype), ramp.less)
        described.append(text)
    # Where two lines start from one base, whose part is whose cannot be told; one alone of each channel can.
    if len(ramps) > 1 and np.prod([ramp.step != 0 for ramp in ramps.values()], axis=0).any():
        raise _belongs(node, array)
    if np.abs(rebuilt - array).max() > POSITION_CONSTANT * max(np.abs(array).max(), 1e-6):
        raise _belongs(node, array)
    return PositionLaw(base, ramps, " and ".join(dict.fromkeys(described)) or "the same everywhere")


def _belongs(node: NodeProto, array: np.ndarray) -> ConflictError:
    return ConflictError(
        node,
        f"its constant of {list(array.shape)} has a value of its own for each place of the traced map (a positional "
        "embedding, or a mask)",
    )


@dataclass(frozen=True)
class _Line:
    """Straight lines along an axis of `count` places, of which some may be level."""

    start: np.ndarray
    step: np.ndarray
    count: int

    def ramp(self) -> tuple[Ramp, str] | None:
        """Their law, by the ends that people give them, and its name; None: it is not seen."""
        start, step = self.start, self.step
        zero = np.zeros_like(step)
        if self._is_whole(step) and (self._is_whole(start) or self._is_whole(2 * start)):
            return Ramp(zero, self._of_moving(step), None), "counting"
        end = start + step * (self.count - 1)
        span = self._of_moving(np.round(end - start))
        if self._is_end(start, 1) and self._is_whole(end) and (np.abs(span) <= 2).all():
            return Ramp(zero, span, 1), "from end to end"
        wide = step * self.count  # of the whole, edges included
        if not self._is_end(wide, 2):
            return None
        wide = self._of_moving(np.round(wide))
        if self._is_end(start - step / 2, 1):
            return Ramp(wide / 2, wide, 0), "the centres of its places"
        if self._is_end(start, 1):
            return Ramp(zero, wide, 0), "the edges of its places"
        return None

    def _of_moving(self, values: np.ndarray) -> np.ndarray:
        """Values of the lines that are not level, 0 of those that are."""
        return np.where(self.step != 0, values, 0)

    def _is_whole(self, values: np.ndarray) -> bool:
        """Whether these are whole numbers, of the lines that are not level."""
        values = values[self.step != 0]
        whole = np.round(values)
        return bool((np.abs(values - whole) < POSITION_CONSTANT * np.maximum(np.abs(whole), 1)).all())

    def _is_end(self, values: np.ndarray, most: int) -> bool:
        """Whether these are whole numbers from -most to most, of the lines that are not level."""
        return self._is_whole(values) and bool((np.abs(np.round(values))[self.step != 0] <= most).all())
