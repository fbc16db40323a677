"""Constants that have a value for each place of a map: their law at other sizes, where it can be seen."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from fcn_deploy.export.dynamic_shapes.shape_writer import Writer
from fcn_deploy.export.dynamic_shapes.shapes import ConflictError, Size
from fcn_deploy.export.tolerances import POSITION_CONSTANT
from onnx import NodeProto, helper


@dataclass(frozen=True)
class Ramp:
    """Values along an axis of n places: at place i, over_n / n + step · i / (n - less), `less` None: step · i."""

    over_n: np.ndarray
    step: np.ndarray
    less: int | None


@dataclass(frozen=True)
class Law:
    """A constant as a sum: `base`, and a ramp along each of some axes."""

    base: np.ndarray
    ramps: dict[int, Ramp]
    said: str

    def written(self, writer: Writer, node: NodeProto, needed: Mapping[int, Size]) -> str:
        kind = helper.np_dtype_to_tensor_dtype(self.base.dtype)
        total = writer.constant("base", self.base)
        for place, ramp in self.ramps.items():
            size = writer.size(needed[place], node)
            count = writer.node("Cast", [size], to=kind)
            scalar = writer.node("Reshape", [size, writer.constant("scalar", np.zeros(0, np.int64))])
            ends = [writer.constant(text, np.array(number, np.int64)) for text, number in (("zero", 0), ("one", 1))]
            steps = writer.node("Cast", [writer.node("Range", [ends[0], scalar, ends[1]])], to=kind)
            line = [-1 if axis_ == place else 1 for axis_ in range(self.base.ndim)]
            steps = writer.node("Reshape", [steps, writer.constant("line", np.array(line, np.int64))])
            if ramp.less is not None:
                # One place has nothing to divide by, and starts at 0.
                under = writer.node("Sub", [size, writer.constant("less", np.array([ramp.less], np.int64))])
                least = writer.constant("least", np.array([1], np.int64))
                over = writer.node("Where", [writer.node("Greater", [under, least]), under, least])
                steps = writer.node("Div", [steps, writer.node("Cast", [over], to=kind)])
            part = writer.node("Mul", [steps, writer.constant("step", ramp.step)])
            if ramp.over_n.any():
                first = writer.node("Div", [writer.constant("first", ramp.over_n), count])
                part = writer.node("Add", [part, first])
            total = writer.node("Add", [total, part])
        return total


def law_of(node: NodeProto, array: np.ndarray, needed: Mapping[int, Size]) -> Law:
    """Raises ConflictError where a constant is no constant, grid or ramp along the axes that grow."""
    first = tuple(slice(0, 1) if place in needed else slice(None) for place in range(array.ndim))
    base, ramps = array[first].copy(), {}
    rebuilt = array[first].astype(np.float64)
    described = []
    for place, size in needed.items():
        count = size[0]
        if count == 1:
            continue
        line = array[tuple(slice(None) if other == place else part for other, part in enumerate(first))].astype(
            np.float64
        )
        start, end = (np.take(line, [at], axis=place) for at in (0, count - 1))
        step = (end - start) / (count - 1)
        if not step.any():
            continue
        found = _ramp(start, end, step, count) if array.dtype.kind == "f" or (step % 1 == 0).all() else None
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
    return Law(base, ramps, " and ".join(dict.fromkeys(described)) or "the same everywhere")


def _belongs(node: NodeProto, array: np.ndarray) -> ConflictError:
    return ConflictError(
        node,
        f"its constant of {list(array.shape)} has a value of its own for each place of the traced map (a positional "
        "embedding, or a mask)",
    )


def _ramp(start: np.ndarray, end: np.ndarray, step: np.ndarray, count: int) -> tuple[Ramp, str] | None:
    """The law of lines from `start` to `end`, of which some may be level, by the ends that people give them."""
    moving = step != 0
    zero = np.zeros_like(step)

    def near(a, b) -> bool:
        return bool((np.abs(a - b)[moving] < 4e-6 * np.maximum(np.abs(b)[moving], 1)).all())

    def whole(a) -> bool:
        return near(a, np.round(a))

    span = np.where(moving, np.round(end - start), 0)
    if whole(step) and (whole(start) or whole(2 * start)):
        return Ramp(zero, np.where(moving, step, 0), None), "counting"
    if (
        whole(start)
        and whole(end)
        and (np.abs(np.round(start))[moving] <= 1).all()
        and (np.abs(span)[moving] <= 2).all()
    ):
        return Ramp(zero, span, 1), "from end to end"
    wide = step * count  # of the whole, edges included
    edges = start - step / 2
    if (
        whole(wide)
        and whole(edges)
        and (np.abs(np.round(edges))[moving] <= 1).all()
        and (np.abs(np.round(wide))[moving] <= 2).all()
    ):
        return Ramp(
            np.where(moving, np.round(wide) / 2, 0), np.where(moving, np.round(wide), 0), 0
        ), "the centres of its places"
    if (
        whole(wide)
        and whole(start)
        and (np.abs(np.round(start))[moving] <= 1).all()
        and (np.abs(np.round(wide))[moving] <= 2).all()
    ):
        return Ramp(zero, np.where(moving, np.round(wide), 0), 0), "the edges of its places"
    return None
