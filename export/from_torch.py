"""export-onnx: a PyTorch network as portable ONNX that takes every size, verified against PyTorch."""

import io
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace

import numpy as np
import onnx
import torch
from fcn_deploy.export.analysis.accepted_sizes import AcceptedSizes, find_accepted_sizes
from fcn_deploy.export.analysis.decision import label_maker
from fcn_deploy.export.analysis.receptive_field import global_operator
from fcn_deploy.export.analysis.upsampling import ends_in_sigmoid, find_end
from fcn_deploy.export.dynamic_shapes.solve import free_sizes
from fcn_deploy.export.graph.edit import attributes, constant, label, opset, producers, set_metadata, set_shape
from fcn_deploy.export.importer.card import SourceOptions, card_of
from fcn_deploy.export.importer.fit import choose_fit, fit_sizes
from fcn_deploy.export.passes.fold_constants import fold_constants
from fcn_deploy.export.passes.reverse_channels import reverse_channels
from fcn_deploy.export.tolerances import EXPORTED_MODEL, SIGMOID_ROUNDING
from fcn_deploy.fcn.architecture import AnySize
from fcn_deploy.fcn.exportable import Exportable
from fcn_deploy.fcn.foreign import Scores, scores_of
from fcn_deploy.runtime.backends.onnxruntime import one_line, session
from fcn_deploy.runtime.errors import DeployError, MisuseError
from fcn_deploy.runtime.files import replacing
from fcn_deploy.runtime.model_card import ACTIVATED_KEY, CARD_KEY, ModelCard, check_card
from onnxruntime import RunOptions
from torch import nn

TRACED = (64, 96)  # or two and three multiples, where those are larger
# Never traced: one pixel, primes, one side eight times the other, below and above the traced size.
VERIFIED_SIZES = (
    (1, 1), (2, 3), (7, 13), (31, 33), (37, 41), (17, 136), (136, 17), (61, 97), (127, 131), (101, 211),
    (128, 160), (200, 333), (257, 263), (320, 64),
)  # fmt: skip
EXPORTERS = ("torchscript", "dynamo")
DYNAMO_OLDEST = 18  # opset; asked for an older one, it writes this without a word
FATAL = 4  # ONNX Runtime's severity


@dataclass(frozen=True)
class Difference:
    """How far ONNX and PyTorch are apart at one size, as a share of the logits' range."""

    size: tuple[int, int]
    batch: int
    logits: float


def export(
    model: nn.Module,
    card: ModelCard | None,
    out: str | os.PathLike,
    *,
    exporter: str = "auto",
    opset_version: int = 18,
    name: str = "the module",
    options: SourceOptions | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> tuple[ModelCard, list[Difference]]:
    """Write `out`: input `image` float32 [N,C,H,W], normalised; output `logits` float32 [N,K,H,W].

    Nothing is written unless ONNX Runtime agrees with PyTorch at all of VERIFIED_SIZES.

    Args:
        model: of ours, or any module of [N,C,H,W] → [N,K,H/s,W/s], [N,H,W,C] → [N,H/s,W/s,K], or a mix of them.
        card: of the model; None: assumed from its shapes.
        out: the .onnx file.
        exporter: `torchscript` (fast, deprecated in PyTorch), `dynamo`, or `auto`: the first, and where what it gives
            does not hold at every size, the second.
        opset_version: 11 to 23; `dynamo` writes 18 and newer.
        name: of the model, for errors.
        options: what the user says of a module without a card; its `output` is the key, field or index of the scores
            (None: `out`, `logits`, or the first map).
        note: called with what was found, chosen and done, a line each.

    Returns:
        (the card that was stored, the differences by size).

    Raises:
        MisuseError: no such output.
        DeployError: it cannot be exported, or a size is baked in.
    """
    options = options or SourceOptions()
    if card is not None and (said := [*options.given(), *(["card"] if options.card else [])]):
        raise MisuseError(f"{name} has a model card; --{said[0]} is for modules without one")
    if isinstance(model, AnySize):
        if options.output is not None:
            raise MisuseError(f"{name} gives scores alone; omit --output {options.output}")
        full, channels = _Multiples(model.eval()), model.architecture.channels
        sizes = AcceptedSizes(model.size_multiple, scores=model.architecture.classes)
    else:
        full = scores_of(model, name, card.channels if card else None, options.output, note)
        channels = full.channels
        sizes = find_accepted_sizes(lambda height, width: _scores_of(full, channels, height, width), name)
    if card is not None:
        check_card(card, channels, sizes.scores, name)
    full = full.eval()  # the exporters put modules back into the mode they came in
    reasons: dict[str, str] = {}
    for attempt in EXPORTERS if exporter == "auto" else (exporter,):
        lines: list[str] = []
        try:
            graph = _to_graph(full, channels, sizes, attempt, opset_version, lines)
            fitted = _fitted(full, graph, channels, sizes, options.fit, name)
        except DeployError as error:
            reasons[attempt] = str(error)
            continue
        break
    else:
        if len(reasons) == 1:
            raise DeployError(*reasons.values())
        raise DeployError(f"{name} cannot be exported: {_joined(reasons)}")
    if reasons:
        note(f"{name} is exported by {attempt}; {_joined(reasons)}")
    for line in (*lines, *(() if isinstance(model, AnySize) else fitted.notes)):
        note(line)
    graph = fitted.graph
    if (node := label_maker(graph)) is not None:
        raise DeployError(f"{name} gives labels by {label(node)}; it must give scores, before an argmax or a threshold")
    if card is None:
        if options.bgr:
            if channels != 3:
                raise MisuseError(f"--bgr is for images of 3 channels, and {name} takes {channels}")
            graph = reverse_channels(graph).model
            note(f"{name} wants BGR, as --bgr says: its channels are reversed, and the ONNX takes RGB")
        lines = []
        scores = _scores_of(full, channels, *traced_size(sizes))
        span = float(scores.min()), float(scores.max())
        card = card_of(graph, channels, sizes.scores, options, name, lines, span=span)
        for line in lines:
            note(line)
        scale = find_end(graph).upsampling.factor
        card = replace(card, stride=max(round(scale[0]) if scale else sizes.factor, 1))
    padded = {"size_multiple": sizes.multiple, "smallest": sizes.smallest} if fitted.fit == "pad" else {}
    card = replace(card, **{"size_multiple": 1, "smallest": 1} | padded, whole=fitted.whole)
    set_metadata(graph, CARD_KEY, card.to_json())
    if card.activation == "multilabel" and ends_in_sigmoid(graph):
        set_metadata(graph, ACTIVATED_KEY, "1")
    with replacing(out) as temporary:
        temporary.write_bytes(graph.SerializeToString())
    return card, fitted.differences


@dataclass(frozen=True)
class _Fitted:
    """A graph that takes every size, as it was compared with PyTorch.

    Attributes:
        graph: with padding, resizing, upsampling and cropping.
        fit: one of export.fit.FITS, or "".
        whole: as the card's.
        differences: from PyTorch, by size.
        notes: what was done.
    """

    graph: onnx.ModelProto
    fit: str
    whole: str
    differences: list[Difference]
    notes: list[str]


def _fitted(
    full: nn.Module, graph: onnx.ModelProto, channels: int, sizes: AcceptedSizes, fit: str | None, name: str
) -> _Fitted:
    """A graph that an exporter wrote, for every size; freed of the sizes that are baked in, where it has some.

    Raises:
        DeployError: it differs from PyTorch, with what is to blame.
    """

    def fitted(graph: onnx.ModelProto, freed: Sequence[str] = ()) -> _Fitted:
        # The exporters name dimensions as they please, and leave known ones out.
        set_shape(graph.graph.input[0], ["N", channels, "H", "W"])
        set_shape(graph.graph.output[0], ["N", sizes.scores, "H", "W"])
        chosen, whole = choose_fit(graph, sizes, fit), global_operator(graph)
        made, notes = fit_sizes(graph, sizes, name, fit)
        made.producer_name = "fcn-deploy"
        onnx.checker.check_model(made)
        differences = verify(references(full, sizes, chosen, channels, name), made, name)
        return _Fitted(made, chosen, whole, differences, [*freed, *notes])

    try:
        return fitted(graph)
    except DeployError as baked:
        try:
            set_shape(graph.graph.input[0], [1, channels, *traced_size(sizes)])
            freed, changes = free_sizes(graph)
            return fitted(freed, [f"{name}: {change}" for change in changes])
        except Exception:  # tried: what was wrong before says more
            raise baked from None


def _joined(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"by {exporter}: {reason}" for exporter, reason in reasons.items())


def traced_size(sizes: AcceptedSizes) -> tuple[int, int]:
    """(height, width) of the image that the exporters run: of a size that the network takes, and not square."""
    least = (max(TRACED[0], sizes.smallest), max(TRACED[1], sizes.smallest + sizes.multiple))
    return tuple(max(-(-side // sizes.multiple), index + 2) * sizes.multiple for index, side in enumerate(least))


def _scores_of(model: nn.Module, channels: int, height: int, width: int) -> np.ndarray | tuple[int, ...]:
    """What a module gives for an image of noise; () where that is no tensor."""
    noise = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        result = model(noise)
    return result.numpy() if isinstance(result, torch.Tensor) else ()


class _Multiples(nn.Module):
    """What is traced of our networks: all but padding and cropping, which are added to the graph."""

    def __init__(self, model: AnySize) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.at_multiples(x)


def _to_graph(
    model: nn.Module, channels: int, sizes: AcceptedSizes, exporter: str, opset_version: int, notes: list[str]
) -> onnx.ModelProto:
    """The module as one of PyTorch's exporters writes it, of the opset that was asked for."""
    if exporter == "dynamo" and opset_version < DYNAMO_OLDEST:
        raise DeployError(f"it writes opset {DYNAMO_OLDEST} and newer, not {opset_version}")
    export_with = _torchscript if exporter == "torchscript" else _dynamo
    mode = Exportable()
    if isinstance(model, Scores):
        model.mode = mode
    try:
        with _quiet():
            graph = export_with(model, channels, sizes, opset_version)
    except Exception as error:
        cause = error
        while cause.__cause__ is not None:  # the exporters wrap what happened in advice
            cause = cause.__cause__
        raise DeployError(f"{type(cause).__name__}: {one_line(cause)[:300]}") from error
    finally:
        if isinstance(model, Scores):
            model.mode = nullcontext()
    if opset(graph) != opset_version:
        raise DeployError(f"it wrote opset {opset(graph)} instead of {opset_version}")
    if mode.respelled:
        notes.append(f"{', '.join(sorted(mode.respelled))}: written as operators that take every size")
    return fold_constants(graph).model


def _torchscript(model: nn.Module, channels: int, sizes: AcceptedSizes, opset_version: int) -> onnx.ModelProto:
    buffer = io.BytesIO()
    torch.onnx.export(
        model,
        (torch.zeros(1, channels, *traced_size(sizes)),),
        buffer,
        dynamo=False,
        opset_version=opset_version,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "N", 2: "H", 3: "W"}, "logits": {0: "N", 2: "H", 3: "W"}},
    )
    return onnx.load_from_string(buffer.getvalue())


def _dynamo(model: nn.Module, channels: int, sizes: AcceptedSizes, opset_version: int) -> onnx.ModelProto:
    batch, rows, columns = (torch.export.Dim(letter) for letter in ("N", "h", "w"))
    program = torch.onnx.export(
        model,
        # Batch 2: a batch of 1 would be taken for a constant.
        (torch.zeros(2, channels, *traced_size(sizes)),),
        dynamo=True,
        opset_version=opset_version,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: batch, 2: sizes.multiple * rows, 3: sizes.multiple * columns},),
    )
    return program.model_proto


@contextmanager
def _quiet():
    """The exporters print and warn much that is no user's business; errors still come as exceptions."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    # It prints whole graphs from C++, whether that is asked for or not.
    printed = torch._C._jit_onnx_log
    torch._C._jit_onnx_log = lambda *parts: None
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch._C._jit_onnx_log = printed
        logging.disable(level)


Expected = list[tuple[np.ndarray, np.ndarray]]  # images, and the scores that PyTorch gives for them


def references(
    model: nn.Module,
    behaviour: AcceptedSizes,
    fit: str,
    channels: int,
    name: str,
    sizes: Sequence[tuple[int, int]] = VERIFIED_SIZES,
) -> Expected:
    """What PyTorch gives at a traced size, and at `sizes`, which never are. Raises DeployError where it fails."""
    run = _any_size(model, behaviour, fit)
    random = np.random.default_rng(0)
    expected = []
    for index, (height, width) in enumerate((traced_size(behaviour), *sizes)):
        batch = 2 if index % 5 == 0 and index else 1
        image = random.standard_normal((batch, channels, height, width), dtype=np.float32)
        with torch.inference_mode():
            try:
                expected.append((image, run(torch.from_numpy(image)).numpy()))
            except Exception as error:
                raise DeployError(f"{name} fails in PyTorch at {height}×{width}: {one_line(error)}") from error
    return expected


def verify(expected: Expected, graph: onnx.ModelProto, name: str) -> list[Difference]:
    """Run ONNX Runtime beside what PyTorch gave, at all sizes but the first, which was traced.

    Raises:
        DeployError: they differ, or ONNX Runtime fails: names the node and the usual cause.
    """
    run, quiet = session(graph.SerializeToString()), RunOptions()
    quiet.log_severity_level = FATAL  # what fails comes as an exception
    # The range of a single pixel's scores says little, so that of the traced size counts as well.
    usual = max(float(np.ptp(expected[0][1])), 1e-6)
    rounding = SIGMOID_ROUNDING if ends_in_sigmoid(graph) else 0.0
    differences = []
    for image, scores in expected[1:]:
        batch, _, height, width = image.shape
        try:
            logits = run.run(None, {graph.graph.input[0].name: image}, quiet)[0]
        except Exception as error:
            raise DeployError(
                f"{name} has a size baked in: it fails at {height}×{width}. {_blame(graph, one_line(error))}"
            ) from error
        if logits.shape != scores.shape:
            raise DeployError(
                f"{name} has a size baked in: at {height}×{width} it gives {list(logits.shape)} instead of "
                f"{list(scores.shape)}. {_blame(graph, '')}"
            )
        apart = max(float(np.abs(logits - scores).max()) - rounding, 0.0)
        difference = apart / max(float(np.ptp(scores)), usual)
        if not difference <= EXPORTED_MODEL:
            raise DeployError(
                f"{name} gives other scores in ONNX than in PyTorch: at {height}×{width} they differ by "
                f"{difference:.1e} of their range (limit {EXPORTED_MODEL:.0e}). {_blame(graph, '')}"
            )
        differences.append(Difference((height, width), batch, difference))
    return differences


def _any_size(model: nn.Module, sizes: AcceptedSizes, fit: str):
    """In PyTorch, what the graph does: pad or resize, run, upsample, crop."""
    import torch.nn.functional as F
    from fcn_deploy.fcn.architecture import upsample

    multiple, smallest = sizes.multiple, sizes.smallest

    def padded(x: torch.Tensor) -> torch.Tensor:
        size = x.shape[2:]
        down, right = (-(-max(side, smallest) // multiple) * multiple - side for side in size)
        logits = model(F.pad(x, (0, right, 0, down)))
        return (upsample(logits, sizes.factor) if sizes.factor > 1 else logits)[:, :, : size[0], : size[1]]

    def resized(x: torch.Tensor) -> torch.Tensor:
        size = x.shape[2:]
        nearest = [max((side + multiple // 2) // multiple * multiple, multiple, smallest) for side in size]
        return F.interpolate(model(F.interpolate(x, nearest, mode="bilinear")), size, mode="bilinear")

    return resized if fit == "resize" else padded


CAUSES = {
    "Resize": "interpolate(size=<int>): pass scale_factor, or size=x.shape[-2:] without int()",
    "Reshape": "view or reshape with numbers taken from the traced image: use flatten, -1, or x.shape",
    "Expand": "expand or repeat to the traced image's size: use x.shape without int()",
    **dict.fromkeys(
        ("Add", "Sub", "Mul", "Div"), "a tensor of the traced image's size: a positional embedding or a grid"
    ),
    "Gemm": "a dense layer after Flatten: turn it into a convolution (fcn_deploy.fcn.convolutionalize)",
    "MatMul": "a dense layer after Flatten: turn it into a convolution (fcn_deploy.fcn.convolutionalize)",
    "AveragePool": "adaptive pooling traced at one size: use a mean over H and W",
}


def _blame(graph: onnx.ModelProto, message: str) -> str:
    """Which node has a size baked in, and the usual cause."""
    named = next((node for node in graph.graph.node if node.name and f"'{node.name}'" in message), None)
    suspect = baked_node(graph) or named
    if suspect is None:
        return f"ONNX Runtime says: {message}" if message else "No single node could be named"
    cause = CAUSES.get(suspect.op_type, "a number taken from the traced image")
    text = f"Node {suspect.name or suspect.output[0]} ({suspect.op_type}); usual cause: {cause}"
    return text if not message else f"{text}. ONNX Runtime says: {message[:200]}"


def baked_node(graph: onnx.ModelProto) -> onnx.NodeProto | None:
    """The first node whose output size is a constant though the image's is not."""
    for node in graph.graph.node:
        if node.op_type == "Resize" and len(node.input) > 3 and node.input[3]:
            # N and K may be computed while H and W are numbers: Concat(Shape(x)[:2], [64, 96]).
            source = producers(graph).get(node.input[3])
            last = source.input[-1] if source is not None and source.op_type == "Concat" else node.input[3]
            sizes = constant(graph, last)
            if sizes is not None and sizes.size and sizes.flat[-1] > 1:
                return node
        if node.op_type in ("Reshape", "Expand"):
            shape = constant(graph, node.input[1])
            # Weights are reshaped as well; they come from constants.
            if shape is not None and (np.asarray(shape) > 1).sum() >= 2 and constant(graph, node.input[0]) is None:
                return node
        if node.op_type in ("Add", "Sub", "Mul", "Div"):
            # Per-channel constants are [C, 1, 1]; one that differs along W or H belongs to one size.
            values = [value for name in node.input if (value := constant(graph, name)) is not None]
            if any(value.ndim and max(value.shape[-2:]) > 1 for value in values):
                return node
        if node.op_type == "AveragePool" and min(attributes(node).get("kernel_shape", [0])) > 7:
            return node
    return None
