"""free_sizes: a network of one size as one that takes every size, by arithmetic on shapes in place of numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from fcn_deploy.export.analysis.branches import first_branching
from fcn_deploy.export.dynamic_shapes.half_traced import half_traced
from fcn_deploy.export.dynamic_shapes.interpret import OF_CONSTANTS
from fcn_deploy.export.dynamic_shapes.shape_writer import ShapeWriter
from fcn_deploy.export.dynamic_shapes.sizes import axis_sizes, is_fixed
from fcn_deploy.export.dynamic_shapes.solver import RemainsError, Solution, Solver, name_of, refusal
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State, TracedGraph
from fcn_deploy.export.dynamic_shapes.traced_size import find_traced_size
from fcn_deploy.export.graph.edit import add_constants, attributes, clone, dims, prune, set_shape
from fcn_deploy.export.passes.fold_constants import fold_constants
from fcn_deploy.runtime.errors import DeployError
from onnx import ModelProto, NodeProto


@dataclass(frozen=True)
class FreedModel:
    """A model whose sizes are free.

    Attributes:
        model: its batch, height and width have names.
        notes: what was changed, a line each kind; none where nothing but the names of dimensions was.
        traced: (N, H, W) that its numbers were for; None where none of them was for a size.
        batch_alone: whether none of them was for H or W, and it is the batch alone that was freed.
        remarks: what it does by numbers that are of a size, most likely, where none is by any shape; a line each.
        size_dependent: the first node that makes scores depend on the image's size otherwise than by what is near
            them, such as a Resize with aligned corners; "": none was seen.
        multiple: what H and W must be multiples of for its padding to be what it was.
    """

    model: ModelProto
    notes: tuple[str, ...] = ()
    traced: tuple[int, int, int] | None = None
    size_dependent: str = ""
    multiple: int = 1
    batch_alone: bool = False
    remarks: tuple[str, ...] = ()


def free_sizes(
    model: ModelProto, size: tuple[int, int] | None = None, assumed: Mapping[str, str] | None = None
) -> FreedModel:
    """A model whose batch, height and width are free, from one in which some or all of them are numbers.

    Args:
        model: one image in, [N,C,H,W] or [N,H,W,C]; its first output follows the image, at its size or smaller.
            Its dimensions may be numbers, or names that promise more than the graph holds.
        size: (height, width) that the model is known to run at, if any is.
        assumed: node → `fixed` or `global`: what the user says its numbers are.

    A batch of 1 that cannot be freed, in a model whose H and W are free already, stays.

    Raises:
        DeployError: a number cannot be told from a size, or what it stands for cannot be computed: names the node.
    """
    if (chooses := first_branching(model)) is not None:
        raise refusal(chooses, "of its branches one alone is seen at one size")
    folded = fold_constants(model, keep=OF_CONSTANTS).model
    shape = dims(folded.graph.input[0])
    if len(folded.graph.input) != 1 or len(shape) != 4:
        raise DeployError(
            f"the model takes {len(folded.graph.input)} inputs, the first {shape}; sizes are freed in models of one "
            "image, [N,C,H,W]"
        )
    graph, places = TracedGraph(folded, assumed), _image_axes(shape)
    remarks: tuple[str, ...] = ()
    batch = shape[0] if isinstance(shape[0], int) and shape[0] > 0 else None
    traced = find_traced_size(graph, places, batch or 1, size)
    if not graph.traced:
        if said := [node for node, what in graph.assumed.items() if what == "global"]:
            raise RemainsError(
                f"--assume {said[0]}=global is for a model of one size, and the sizes of this one are free as it is; "
                "export it again with dynamic axes for N, H and W"
            )
        state = Solver(graph, places, traced, free="HW").refuse_remains()
        remarks = () if state is None else tuple(half_traced(state))
    if not graph.traced and batch is None:
        return FreedModel(model, remarks=remarks)
    try:
        solution = Solver(graph, places, traced).solve()
        made, notes = _write(graph, solution, places)
    except DeployError:
        if graph.traced or batch != 1:
            raise
        return FreedModel(model, remarks=remarks)
    multiple = math.lcm(*(taken.multiple for taken in solution.taken.values()))
    dependent = _size_dependent(graph, solution)
    return FreedModel(made, tuple(notes), traced, dependent, multiple, not graph.traced, remarks)


def _image_axes(shape: Sequence[int | str | None]) -> tuple[int, int]:
    """The axes of height and width: 2 and 3, or 1 and 2 where channels come last."""
    last_is_channels = isinstance(shape[3], int) and shape[3] <= 4 and not (isinstance(shape[1], int) and shape[1] <= 4)
    return (1, 2) if last_is_channels else (2, 3)


def _write(graph: TracedGraph, solution: Solution, places: tuple[int, int]) -> tuple[ModelProto, list[str]]:
    """(the network with what its nodes were taken for, what was changed and assumed, a line each kind)."""
    model = clone(graph.model)
    writer = ShapeWriter(graph, solution.state)
    nodes: list[NodeProto] = []
    said: dict[tuple[str, str], list[str]] = {}
    for index, node in enumerate(graph.nodes):
        taken = solution.taken.get(index)
        if taken is None:
            nodes.append(node)
            continue
        try:
            new = taken.rewrite(writer) if taken.rewrite is not None else [node]
        except ConflictError as conflict:
            raise refusal(node, conflict.reason) from conflict
        nodes += [*writer.before, *new]
        writer.before.clear()
        if taken.rewrite is not None or taken.assumption:
            what = node.op_type, taken.assumption or taken.description
            said.setdefault(what, []).append(node.name or node.output[0])
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    add_constants(model, writer.constants)
    prune(model)
    _name_dimensions(model, solution, places)
    return model, [
        f"{operator} {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {text}"
        for (operator, text), names in said.items()
    ]


def _name_dimensions(model: ModelProto, solution: Solution, places: tuple[int, int]) -> None:
    """Declare the sizes of the image and of the outputs, by name where they are free."""
    del model.graph.value_info[:]
    image = model.graph.input[0]
    shape = [side if side is not None else "C" for side in dims(image)]
    shape[0], shape[places[0]], shape[places[1]] = "N", "H", "W"
    set_shape(image, shape, image.type.tensor_type.elem_type)
    for output in model.graph.output:
        found = axis_sizes(solution.state.shape(output.name))
        named = [
            size[0] if is_fixed(size) else name_of(size, solution.image, place) for place, size in enumerate(found)
        ]
        set_shape(output, named, output.type.tensor_type.elem_type)


def _size_dependent(graph: TracedGraph, solution: Solution) -> str:
    """The first node that makes scores depend on the image's size otherwise than by what is near them."""
    for index, node in enumerate(graph.nodes):
        taken = solution.taken.get(index)
        if _depends_on_size(node, solution.state) or (taken is not None and taken.size_dependent):
            return f"{node.op_type} {node.name or node.output[0]}"
    return ""


def _depends_on_size(node: NodeProto, state: State) -> bool:
    """Whether a node gives grids, or resizes by a factor that changes with the image, or by aligned corners."""
    if not state.is_data(node.output[0]):
        return False
    if node.op_type != "Resize":
        return node.op_type in ("GridSample", "AffineGrid", "Range")
    before, after = (axis_sizes(state.shape(name)) for name in (node.input[0], node.output[0]))
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new and set(old) != {1}]
    aligned = attributes(node).get("coordinate_transformation_mode") == "align_corners"
    return any(aligned or len({Fraction(b, a) for a, b in zip(old, new, strict=True)}) > 1 for old, new in changed)
