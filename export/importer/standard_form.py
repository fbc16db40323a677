"""Any segmentation ONNX in the form that engines are built from: float32 [N,C,H,W] in, scores [N,K,H,W] out, a card.

What is guessed or changed on the way is a note. What comes out is compared with the model as it was given, run by
ONNX Runtime at its own conventions, before anything is built.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from fcn_deploy.export.analysis.accepted_sizes import AcceptedSizes, find_accepted_sizes, run_quietly
from fcn_deploy.export.analysis.decision import Decision, label_maker
from fcn_deploy.export.dynamic_shapes.free import freed
from fcn_deploy.export.graph.edit import (
    Names,
    add_constants,
    attributes,
    clone,
    constant,
    dims,
    label,
    metadata,
    producers,
    prune,
    set_shape,
)
from fcn_deploy.export.importer.card import SourceOptions, card_of
from fcn_deploy.export.importer.fit import choose_fit, fit_sizes
from fcn_deploy.export.importer.foreign_model import Cut, Original, follows
from fcn_deploy.export.importer.load import load_model
from fcn_deploy.export.passes.as_float32 import as_float32
from fcn_deploy.export.passes.cancel_transposes import cancel_transposes
from fcn_deploy.export.passes.cut_decision import cut_decision
from fcn_deploy.export.passes.explicit_padding import explicit_padding
from fcn_deploy.export.passes.floor_pooling import floor_pooling
from fcn_deploy.export.passes.fold_constants import fold_constants
from fcn_deploy.export.passes.image_input import image_input
from fcn_deploy.export.passes.raise_opset import raise_opset
from fcn_deploy.export.passes.reverse_channels import reverse_channels
from fcn_deploy.export.tolerances import STANDARD_FORM
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.errors import DeployError, MisuseError
from fcn_deploy.runtime.model_card import CARD_KEY, ModelCard, check_card
from onnx import ModelProto, NodeProto, TensorProto, helper

NO_SIZES = AcceptedSizes()


@dataclass(frozen=True)
class Source:
    """A model to build from.

    Attributes:
        model: float32 [N,C,H,W] → scores [N,K,H,W] at every H, W ≥ 1.
        card: its own, or what was said and assumed of it.
        notes: what was assumed of it or changed in it, a line each.
        sizes: that the model takes by itself.
        fit: how it was made to take the others: one of export.fit.FITS; "": it takes them all.
    """

    model: ModelProto
    card: ModelCard
    notes: tuple[str, ...]
    sizes: AcceptedSizes = NO_SIZES
    fit: str = ""


def read_source(path: str | os.PathLike, options: SourceOptions | None = None) -> Source:
    """Read an ONNX model, bring it into the standard form, and find or make its card.

    Args:
        path: of a segmentation model: any opset from 7 on, [N,C,H,W] or [N,H,W,C] in and out, of any type of number,
            with scores, probabilities or labels as outputs, of the image's size or smaller.
        options: what the user says of it; None: nothing.

    Raises:
        MisuseError: no such file or output, or options that contradict the model or its own card.
        DeployError: a model that cannot be taken: its node and the reason.
    """
    options, name = options or SourceOptions(), str(path)
    given = load_model(path, options.output)
    text = metadata(given, CARD_KEY)
    if text is not None and (said := [*options.given(), *(["card"] if options.card else [])]):
        raise MisuseError(f"{name} has a model card; --{said[0]} is for models without one")
    notes: list[str] = []
    original = Original(given, name, notes)
    model, cut = _standard(original, options, notes)
    if options.bgr:
        if original.channels != 3:
            raise MisuseError(f"--bgr is for images of 3 channels, and {name} takes {original.channels}")
        model = reverse_channels(model).model
        notes.append(f"{name} wants BGR, as --bgr says: its channels are reversed, and the engine takes RGB")
    model, sizes, fit = _any_size(model, original, cut, options, notes)
    scores = sizes.scores
    if text is not None:
        card = ModelCard.from_json(text, name)
        check_card(card, original.channels, scores, name)
    else:
        threshold = cut.decision.threshold if cut.decision is not None else None
        span = float(original.result.min()), float(original.result.max())
        card = card_of(model, original.channels, scores, options, name, notes, original.kind, threshold, span)
    return Source(model, card, tuple(notes), sizes, fit)


def _standard(original: Original, options: SourceOptions, notes: list[str]) -> tuple[ModelProto, Cut]:
    """The model as float32 [N,C,H,W] → scores [N,K,h,w], and what its output was before."""
    name = original.name
    model = clone(original.model)
    kept = next(value for value in model.graph.output if value.name == original.output)
    model.graph.output.insert(0, kept)
    del model.graph.output[1:]
    prune(model)
    try:
        floats = as_float32(model)
        raised = raise_opset(floats.model)
        # Every runtime takes padding written as numbers, and sizes rounded down, alike.
        model = floor_pooling(explicit_padding(fold_constants(raised.model).model).model).model
        model = image_input(model, original.axis).model
        cut = cut_decision(model)
    except DeployError as error:
        raise DeployError(f"{name}: {error}") from error
    model, decision = cut.model, cut.decision
    notes += [*floats.said_of(name), *raised.said_of(name)]
    node = label_maker(model) if decision is None else None
    if decision is None and node is None and original.result.dtype.kind in "iub" and _single(original):
        node = producers(model)[model.graph.output[0].name]
    if node is not None:
        raise DeployError(
            f"{name} gives labels of {original.result.dtype} by node {label(node)}, from which no scores can be told; "
            "export it without what makes labels of scores"
        )
    notes += cut.said_of(name)
    image = original.images()
    model, coarse = _channelwise_softmax(model, image)
    if coarse:
        notes.append(
            f"{name}: the Softmax at its end is over the whole image, as its opset says; it is taken over the "
            "channels, which changes no label"
        )
    background = False
    if options.activation in (None, "softmax") and options.threshold is None:
        threshold = 0.5 if decision is None else decision.threshold
        if threshold == 0.5:
            model, background = _with_background(model, image)
    if background:
        notes.append(f"{name} gives the second of two channels after its Softmax; both are used, as two classes")
        decision = None if decision is None else replace(decision, threshold=0.5)
    model = cancel_transposes(_four_axes(model, original, image)).model
    _declare(model, original)
    if background and decision is not None:
        return model, Cut(Decision("argmax", decision.node))
    return model, Cut(decision, background, coarse)


def _single(original: Original) -> bool:
    """Whether there is one number per pixel."""
    rows, columns, _ = follows(original.result.shape, original.size)
    return original.result.size == original.result.shape[rows] * original.result.shape[columns]


def _shapes(model: ModelProto, names: Sequence[str], image: np.ndarray) -> dict[str, np.ndarray]:
    """What some tensors of a model are for an image."""
    probed = clone(model)
    del probed.graph.output[:]
    probed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names))
    # ONNX Runtime finds the types of outputs by itself.
    run = session(probed.SerializeToString(), optimise=False)
    return dict(zip(dict.fromkeys(names), run.run(None, {model.graph.input[0].name: image}), strict=True))


def _set_output(model: ModelProto, name: str) -> None:
    output = model.graph.output[0]
    output.CopyFrom(onnx.ValueInfoProto(name=name))
    output.type.tensor_type.elem_type = TensorProto.FLOAT
    prune(model)


ORDER_KEEPING = ("Identity", "Squeeze", "Unsqueeze", "Reshape", "Flatten", "Cast")


def _channelwise_softmax(model: ModelProto, image: np.ndarray) -> tuple[ModelProto, bool]:
    """A Softmax at the end over C·H·W, as opset 12 and older have it by default, over C instead."""
    made, name = producers(model), model.graph.output[0].name
    while (node := made.get(name)) is not None and node.op_type in ("Identity", "Transpose", "Cast"):
        name = node.input[0]
    softmax = made.get(node.input[0]) if node is not None and node.op_type == "Reshape" else None
    flatten = made.get(softmax.input[0]) if softmax is not None and softmax.op_type == "Softmax" else None
    if flatten is None or flatten.op_type != "Flatten" or attributes(flatten).get("axis", 1) != 1:
        return model, False
    values = _shapes(model, [flatten.input[0], node.output[0]], image)
    before, after = values[flatten.input[0]], values[node.output[0]]
    if before.ndim != 4 or before.shape != after.shape or before.shape[1] < 2:
        return model, False
    model = clone(model)
    node = producers(model)[node.output[0]]
    node.CopyFrom(helper.make_node("Softmax", [flatten.input[0]], [node.output[0]], name=softmax.name, axis=1))
    prune(model)
    return model, True


def _with_background(model: ModelProto, image: np.ndarray) -> tuple[ModelProto, bool]:
    """The Softmax of two channels as output, where a model gives its second channel alone."""
    made, name = producers(model), model.graph.output[0].name
    while (node := made.get(name)) is not None and node.op_type in (*ORDER_KEEPING, "Transpose"):
        name = node.input[0]
    if node is None or (axis := _takes_second(model, node, name)) is None:
        return model, False
    softmax = made.get(node.input[0])
    if softmax is None or softmax.op_type != "Softmax":
        return model, False
    value = _shapes(model, [softmax.output[0]], image)[softmax.output[0]]
    if value.ndim != 4 or value.shape[axis] != 2 or attributes(softmax).get("axis", -1) % 4 != axis % 4:
        return model, False
    model = clone(model)
    _set_output(model, softmax.output[0])
    return model, True


def _takes_second(model: ModelProto, node: NodeProto, result: str) -> int | None:
    """The axis along which a node takes index 1 alone; None where it does something else."""
    found = attributes(node)
    if node.op_type == "Gather":
        index = constant(model, node.input[1])
        return found.get("axis", 0) if index is not None and index.size == 1 and int(index.item()) in (1, -1) else None
    if node.op_type == "Slice" and len(node.input) > 3:
        values = [constant(model, name) for name in node.input[1:] if name]
        if all(value is not None and value.size == 1 for value in values):
            start, end, axis, *step = (int(value.item()) for value in values)
            return axis if start in (1, -1) and (end >= 2) and step in ([], [1]) else None
    if node.op_type == "Split" and list(node.output).index(result) == 1:
        return found.get("axis", 0)
    return None


def _four_axes(model: ModelProto, original: Original, image: np.ndarray) -> ModelProto:
    """The model with scores [N,K,h,w], where they lack an axis or have the channels last."""
    made, names = producers(model), [model.graph.output[0].name]
    while (node := made.get(names[-1])) is not None and node.op_type in ORDER_KEEPING:
        names.append(node.input[0])
    values = _shapes(model, names, image)
    result = values[names[0]]
    places = follows(result.shape, original.size)
    if places is None:
        raise DeployError(f"{original.name}: scores are {list(result.shape)}, which does not follow the image's size")
    model = clone(model)
    if result.ndim == 4 and places[:2] == (2, 3):
        return model
    # Before axes were taken away, or one channel was put elsewhere, there was a tensor of four.
    for name in names[1:]:
        before = values[name]
        if (
            before.ndim == 4
            and (found := follows(before.shape, original.size)) is not None
            and found[:2] == (2, 3)
            and before.dtype.kind == "f"
            and np.array_equal(before.ravel(), result.ravel())
        ):
            _set_output(model, name)
            return model
    steps: list[tuple[str, dict]] = []
    if result.ndim == 2:
        steps = [("Unsqueeze", {"axes": [0, 1]})]
    elif result.ndim == 3 and places[:2] == (1, 2):
        steps = [("Unsqueeze", {"axes": [1 if len(result) == len(image) else 0]})]
    elif result.ndim == 3:
        steps = [("Unsqueeze", {"axes": [0]}), ("Transpose", {"perm": [0, 3, 1, 2]})]
    else:
        steps = [("Transpose", {"perm": [0, 3, 1, 2]})]
    new, name = Names(model), names[0]
    for operator, extra in steps:
        out, reads = new(f"{name}/{operator.lower()}"), [name]
        if "axes" in extra:
            reads.append(new(f"{out}/axes"))
            add_constants(model, {reads[1]: np.array(extra.pop("axes"), np.int64)})
        model.graph.node.append(helper.make_node(operator, reads, [out], name=out, **extra))
        name = out
    _set_output(model, name)
    return model


def _declare(model: ModelProto, original: Original) -> None:
    """Name the dimensions of a model's input and output, and make its scores float32."""
    image, output = model.graph.input[0], model.graph.output[0]
    scores = _shapes(model, [output.name], original.images())[output.name]
    if scores.dtype != np.float32:
        name = Names(model)(f"{output.name}/float32")
        model.graph.node.append(helper.make_node("Cast", [output.name], [name], name=name, to=TensorProto.FLOAT))
        output.name = name
    set_shape(image, ["N", original.channels, "H", "W"])
    cells = ["H", "W"] if scores.shape[2:] == original.size else ["h", "w"]
    set_shape(output, ["N", scores.shape[1], *cells])
    del model.graph.value_info[:]


def _any_size(
    model: ModelProto, original: Original, cut: Cut, options: SourceOptions, notes: list[str]
) -> tuple[ModelProto, AcceptedSizes, str]:
    """The model made to take every size, the sizes that it takes by itself, and how it was made to."""
    name = original.name
    model, least = _freed(model, original, notes)
    original.compare(model, cut, options.bgr)
    sizes = _probed(model, original)
    sizes = replace(sizes, multiple=math.lcm(sizes.multiple, least))
    if not _takes_batches(model, original):
        notes.append(f"{name} takes one image at a time: in a batch it gives other scores, or none")
    fit = choose_fit(model, sizes, options.fit)
    model, said = fit_sizes(model, sizes, name, options.fit)
    notes += said
    return model, sizes, fit


def _takes_batches(model: ModelProto, original: Original) -> bool:
    """Whether two images at once have the scores that they have alone."""
    run, images = session(model.SerializeToString()), original.images(count=2)
    alone = np.concatenate([run_quietly(run, images[index : index + 1])[0] for index in range(2)])
    try:
        together = run_quietly(run, images)[0]
    except Exception:  # a batch of one that is baked in
        return False
    spread = max(float(np.ptp(alone)), 1e-6)
    return together.shape == alone.shape and np.abs(together - alone).max() <= STANDARD_FORM * spread


def _freed(model: ModelProto, original: Original, notes: list[str]) -> tuple[ModelProto, int]:
    """The model with its batch, height and width free, and a multiple that its sizes must be of."""
    if not original.static and metadata(original.model, CARD_KEY) is not None:
        return model, 1
    model = clone(model)
    names = dims(model.graph.output[0])
    sides = [side or letter for side, letter in zip(original.declared, "HW", strict=True)]
    set_shape(model.graph.input[0], [original.batch or "N", original.channels, *sides])
    model, changes, multiple = freed(model, original.name, original.size)
    notes += changes
    set_shape(model.graph.input[0], ["N", original.channels, "H", "W"])
    set_shape(model.graph.output[0], ["N", *names[1:]])
    return model, multiple


def _probed(model: ModelProto, original: Original) -> AcceptedSizes:
    """What sizes a model takes, by running it."""
    run = session(model.SerializeToString())
    return find_accepted_sizes(
        lambda height, width: run_quietly(run, original.images((height, width)))[0], original.name
    )
