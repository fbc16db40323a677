"""A foreign model as float32 [N,C,H,W] → scores [N,K,h,w]: types, layout, opset and output made the same for all."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from fcn_deploy.export.analysis.channel_layout import channels_of_output
from fcn_deploy.export.analysis.decision import Decision, label_maker
from fcn_deploy.export.analysis.scaled_probability import scaled_probability
from fcn_deploy.export.graph.edit import (
    Names,
    add_constants,
    attributes,
    clone,
    label,
    producers,
    prune,
    set_shape,
)
from fcn_deploy.export.graph.index import GraphIndex
from fcn_deploy.export.importer.flattened import chain_to_map, is_the_map
from fcn_deploy.export.importer.foreign_model import ForeignModel
from fcn_deploy.export.importer.options import ImportOptions
from fcn_deploy.export.importer.score_map import OutputChange, find_map_axes, may_be_either
from fcn_deploy.export.passes.as_float32 import as_float32
from fcn_deploy.export.passes.cancel_transposes import cancel_transposes
from fcn_deploy.export.passes.cut_decision import WithoutDecision, cut_decision
from fcn_deploy.export.passes.explicit_padding import explicit_padding
from fcn_deploy.export.passes.floor_pooling import floor_pooling
from fcn_deploy.export.passes.fold_constants import fold_constants
from fcn_deploy.export.passes.image_input import image_input
from fcn_deploy.export.passes.raise_opset import raise_opset
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.errors import DeployError
from onnx import ModelProto, NodeProto, TensorProto, helper

ORDER_KEEPING = ("Identity", "Squeeze", "Unsqueeze", "Reshape", "Flatten", "Cast")


def standard_form(foreign: ForeignModel, options: ImportOptions) -> tuple[ModelProto, OutputChange, list[str]]:
    """(the model as float32 [N,C,H,W] → scores [N,K,h,w], what these are to the foreign output, notes, a line each).

    Args:
        foreign: any segmentation model that runs.
        options: whose activation and threshold tell whether one channel of two is wanted alone.

    Raises:
        DeployError: labels from which no scores can be told, or an operator that cannot be converted.
    """
    name = foreign.name
    model, notes = _at_usual_types(foreign)
    scaled = scaled_probability(model) if options.activation != "none" and _one_per_pixel(foreign) else None
    if scaled is not None:
        model = clone(model)
        _set_output(model, scaled.name)
        notes.append(
            f"{name} gives a probability times {scaled.factor:g} (node {scaled.node}), which is left out "
            "(--activation none gives its values as they are)"
        )
    cut = _scores_of_labels(model, foreign)
    model, decision = cut.model, cut.decision
    notes += cut.said_of(name)
    threshold = None if decision is None else decision.threshold
    compared = None if threshold is None else scaled_probability(model)
    if decision is not None and threshold is not None and compared is not None and not compared.whole:
        model = clone(model)
        _set_output(model, compared.name)
        decision = replace(decision, threshold=threshold / compared.factor)
        times = f"{compared.factor:g} (node {compared.node})"
        notes.append(f"{name} compares a probability times {times}, which is left out")
    image = foreign.images()
    channelwise = _channelwise_softmax(model, image)
    if channelwise is not None:
        model = channelwise
        notes.append(
            f"{name}: the Softmax at its end is over the whole image, as its opset says; it is taken over the "
            "channels, which changes no label"
        )
    both = None
    if options.activation in (None, "softmax") and options.threshold is None:
        threshold = 0.5 if decision is None else decision.threshold
        both = _both_channels(model, image) if threshold == 0.5 else None
    if both is not None:
        model = both
        notes.append(f"{name} gives the second of two channels after its Softmax; both are used, as two classes")
    model = cancel_transposes(_four_axes(model, foreign, image)).model
    _declare(model, foreign)
    if both is not None and decision is not None:
        return model, OutputChange(Decision("argmax", decision.node)), notes
    change = OutputChange(decision, both is not None, channelwise is not None)
    if scaled is not None:
        change = replace(change, factor=scaled.factor, whole=scaled.whole)
    return model, change, notes


def _at_usual_types(foreign: ForeignModel) -> tuple[ModelProto, list[str]]:
    """The part of a model that gives its output, in float32, [N,C,H,W] in, of a recent opset; and what was changed."""
    model = clone(foreign.model)
    kept = clone(next(value for value in model.graph.output if value.name == foreign.output))
    del model.graph.output[:]
    model.graph.output.append(kept)
    prune(model)
    try:
        floats = as_float32(model)
        raised = raise_opset(floats.model)
        # Every runtime takes padding that is written as numbers, and sizes that are rounded down, alike.
        explicit = explicit_padding(fold_constants(raised.model).model)
        changed = image_input(floor_pooling(explicit.model).model, foreign.channels_axis)
        if foreign.output in foreign.flat:
            return _with_map(changed.model, foreign), [
                f"{foreign.name} gives scores whose pixels are flattened; the map that they were is used",
                *floats.said_of(foreign.name),
                *raised.said_of(foreign.name),
            ]
    except DeployError as error:
        raise DeployError(f"{foreign.name}: {error}") from error
    return changed.model, [*floats.said_of(foreign.name), *raised.said_of(foreign.name)]


def _with_map(model: ModelProto, foreign: ForeignModel) -> ModelProto:
    """A model whose flattened scores are the map that they were. Raises DeployError where that is not found."""
    image, factor = foreign.images()[:1], foreign.flat[foreign.output]
    names, softmax = chain_to_map(model)
    values = _values(model, names, image)
    model = clone(model)
    for name in names[1:]:
        classes = is_the_map(values[name], values[names[0]][:1], foreign.size, factor, softmax)
        if classes is None:
            continue
        if softmax:
            _append(model, name, [(softmax, {"axis": classes})])
        else:
            _set_output(model, name)
        return model
    raise DeployError(
        f"its scores {foreign.output} {list(values[names[0]].shape)} are flattened, and the map that they were is not "
        "found before them; export it with scores [N,K,H,W]"
    )


def _scores_of_labels(model: ModelProto, foreign: ForeignModel) -> WithoutDecision:
    """The model without what makes labels of scores, and that; None: it gives scores.

    Raises:
        DeployError: it gives labels, and no scores can be told.
    """
    try:
        cut = cut_decision(model)
    except DeployError as error:
        raise DeployError(f"{foreign.name}: {error}") from error
    if cut.decision is not None:
        return cut
    node = label_maker(model)
    whole = foreign.result.dtype.kind in "iub" and model.graph.output[0].name == foreign.output
    if node is None and whole and _one_per_pixel(foreign):
        node = producers(model)[model.graph.output[0].name]
    if node is not None:
        raise DeployError(
            f"{foreign.name} gives labels of {foreign.result.dtype} by node {label(node)}, from which no scores can "
            "be told; export it without what makes labels of scores"
        )
    return cut


def _one_per_pixel(foreign: ForeignModel) -> bool:
    """Whether the output has one number per pixel."""
    axes, shape = find_map_axes(foreign.result.shape, foreign.size), foreign.result.shape
    return axes is not None and foreign.result.size == shape[axes.rows] * shape[axes.columns]


def _values(model: ModelProto, names: Iterable[str], image: np.ndarray) -> dict[str, np.ndarray]:
    """What some tensors of a model are for an image."""
    wanted = list(dict.fromkeys(names))
    probed = clone(model)
    del probed.graph.output[:]
    # ONNX Runtime finds the types of outputs by itself.
    probed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    run = session(probed.SerializeToString(), optimise=False)
    return dict(zip(wanted, run.run(None, {model.graph.input[0].name: image}), strict=True))


def _set_output(model: ModelProto, name: str) -> None:
    output = model.graph.output[0]
    output.CopyFrom(onnx.ValueInfoProto(name=name))
    output.type.tensor_type.elem_type = TensorProto.FLOAT
    prune(model)


def _channelwise_softmax(model: ModelProto, image: np.ndarray) -> ModelProto | None:
    """A Softmax at the end over C·H·W, as opset 12 and older have it by default, over C instead; None: it has none."""
    made, name = producers(model), model.graph.output[0].name
    while (reshape := made.get(name)) is not None and reshape.op_type in ("Identity", "Transpose", "Cast"):
        name = reshape.input[0]
    if reshape is None or reshape.op_type != "Reshape":
        return None
    softmax = made.get(reshape.input[0])
    if softmax is None or softmax.op_type != "Softmax":
        return None
    flatten = made.get(softmax.input[0])
    if flatten is None or flatten.op_type != "Flatten" or attributes(flatten).get("axis", 1) != 1:
        return None
    values = _values(model, [flatten.input[0], reshape.output[0]], image)
    before, after = values[flatten.input[0]], values[reshape.output[0]]
    if before.ndim != 4 or before.shape != after.shape or before.shape[1] < 2:
        return None
    model = clone(model)
    node = producers(model)[reshape.output[0]]
    node.CopyFrom(helper.make_node("Softmax", [flatten.input[0]], [node.output[0]], name=softmax.name, axis=1))
    prune(model)
    return model


def _both_channels(model: ModelProto, image: np.ndarray) -> ModelProto | None:
    """The Softmax of two channels as output, where a model gives its second channel alone; None: it does not."""
    made, name = producers(model), model.graph.output[0].name
    while (node := made.get(name)) is not None and node.op_type in (*ORDER_KEEPING, "Transpose"):
        name = node.input[0]
    if node is None or (axis := _takes_second(model, node, name)) is None:
        return None
    softmax = made.get(node.input[0])
    if softmax is None or softmax.op_type != "Softmax":
        return None
    value = _values(model, [softmax.output[0]], image)[softmax.output[0]]
    if value.ndim != 4 or value.shape[axis] != 2 or attributes(softmax).get("axis", -1) % 4 != axis % 4:
        return None
    model = clone(model)
    _set_output(model, softmax.output[0])
    return model


def _takes_second(model: ModelProto, node: NodeProto, result: str) -> int | None:
    """The axis along which a node takes index 1 alone; None where it does something else."""
    settings = attributes(node)
    if node.op_type == "Gather":
        index = GraphIndex(model).constant(node.input[1])
        taken = index is not None and index.size == 1 and int(index.item()) in (1, -1)
        return settings.get("axis", 0) if taken else None
    if node.op_type == "Slice" and len(node.input) > 3:
        graph = GraphIndex(model)
        values = [graph.constant(name) for name in node.input[1:] if name]
        numbers = [int(value.item()) for value in values if value is not None and value.size == 1]
        if len(numbers) == len(values):
            start, end, axis, *step = numbers
            return axis if start in (1, -1) and end >= 2 and step in ([], [1]) else None
    if node.op_type == "Split" and list(node.output).index(result) == 1:
        return settings.get("axis", 0)
    return None


def _four_axes(model: ModelProto, foreign: ForeignModel, image: np.ndarray) -> ModelProto:
    """The model with scores [N,K,h,w], where they lack an axis or have the channels last."""
    made, names = producers(model), [model.graph.output[0].name]
    while (node := made.get(names[-1])) is not None and node.op_type in ORDER_KEEPING:
        names.append(node.input[0])
    values = {names[0]: known} if (known := _known_scores(model, foreign)) is not None else _values(model, names, image)
    result = values[names[0]]
    axes = find_map_axes(result.shape, foreign.size)
    if axes is None:
        raise DeployError(f"{foreign.name}: scores are {list(result.shape)}, which does not follow the image's size")
    model = clone(model)
    if may_be_either(result.shape, foreign.size) and channels_of_output(model, names[0]) == 3:
        _append(model, names[0], [("Transpose", {"perm": [0, 3, 1, 2]})])
        return model
    if result.ndim == 4 and axes.rows == 2:
        return model
    # Before axes were taken away, or one channel was put elsewhere, there was a tensor of four.
    for name in names[1:]:
        before = values[name]
        found = find_map_axes(before.shape, foreign.size)
        four = before.ndim == 4 and found is not None and found.rows == 2 and before.dtype.kind == "f"
        if four and np.array_equal(before.ravel(), result.ravel()):
            _set_output(model, name)
            return model
    steps: list[tuple[str, dict[str, Any]]] = []
    if result.ndim == 2:
        steps = [("Unsqueeze", {"axes": [0, 1]})]
    elif result.ndim == 3 and axes.rows == 1:
        steps = [("Unsqueeze", {"axes": [1 if len(result) == len(image) else 0]})]
    elif result.ndim == 3:
        steps = [("Unsqueeze", {"axes": [0]}), ("Transpose", {"perm": [0, 3, 1, 2]})]
    else:
        steps = [("Transpose", {"perm": [0, 3, 1, 2]})]
    _append(model, names[0], steps)
    return model


def _known_scores(model: ModelProto, foreign: ForeignModel) -> np.ndarray | None:
    """What a model gives, of the shape and type of this, where that is the foreign output as it is, a map [N,K,h,w]."""
    output, result = model.graph.output[0].name, foreign.result
    if output != foreign.output or output in foreign.flat or result.ndim != 4 or result.dtype != np.float32:
        return None
    axes = find_map_axes(result.shape, foreign.size)
    return result if axes is not None and axes.rows == 2 else None


def _append(model: ModelProto, name: str, steps: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Make the result of operators, one after the other on the tensor `name`, a model's output."""
    new = Names(model)
    for operator, settings in steps:
        out, reads = new(f"{name}/{operator.lower()}"), [name]
        if "axes" in settings:
            reads.append(new(f"{out}/axes"))
            add_constants(model, {reads[1]: np.array(settings.pop("axes"), np.int64)})
        model.graph.node.append(helper.make_node(operator, reads, [out], name=out, **settings))
        name = out
    _set_output(model, name)


def _declare(model: ModelProto, foreign: ForeignModel) -> None:
    """Name the dimensions of a model's input and output, and make its scores float32."""
    image, output = model.graph.input[0], model.graph.output[0]
    scores = _known_scores(model, foreign)
    if scores is None:
        scores = _values(model, [output.name], foreign.images())[output.name]
    if scores.dtype != np.float32:
        name = Names(model)(f"{output.name}/float32")
        model.graph.node.append(helper.make_node("Cast", [output.name], [name], name=name, to=TensorProto.FLOAT))
        output.name = name
    set_shape(image, ["N", foreign.channels, "H", "W"])
    cells = ["H", "W"] if scores.shape[2:] == foreign.size else ["h", "w"]
    set_shape(output, ["N", scores.shape[1], *cells])
    del model.graph.value_info[:]
