"""export-onnx: a PyTorch network as portable ONNX that takes every size, verified against PyTorch."""

import io
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from fcn_deploy.export.analysis.accepted_sizes import (
    AcceptedSizes,
    find_accepted_sizes,
    only_at,
    run_quietly,
    size_that_runs,
)
from fcn_deploy.export.analysis.decision import label_maker
from fcn_deploy.export.analysis.map_shapes import score_stride
from fcn_deploy.export.analysis.model_end import ends_in_sigmoid, find_end
from fcn_deploy.export.analysis.receptive_field import global_operator
from fcn_deploy.export.dynamic_shapes.baked_node import describe_cause
from fcn_deploy.export.dynamic_shapes.free_sizes import free_sizes
from fcn_deploy.export.graph.edit import clone, label, opset, set_shape
from fcn_deploy.export.importer.card import CardEvidence, card_of, store_card
from fcn_deploy.export.importer.fit_images import PADDED_TO, choose_fit, fit_images, padded_by_choice
from fcn_deploy.export.importer.options import ImportOptions
from fcn_deploy.export.importer.output_kind import kind_of_output, refusal_of
from fcn_deploy.export.passes.fold_constants import fold_constants
from fcn_deploy.export.passes.reverse_channels import reverse_channels
from fcn_deploy.export.passes.split_head import split_head
from fcn_deploy.export.tolerances import EXPORTED_MODEL, SIGMOID_ROUNDING
from fcn_deploy.fcn.architecture import AnySize, upsample
from fcn_deploy.fcn.exportable import Exportable
from fcn_deploy.fcn.foreign import ScoresModule, likely_sizes, scores_of
from fcn_deploy.fcn.programs import is_program, is_script
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.errors import MOST, DeployError, MisuseError, brief, one_line
from fcn_deploy.runtime.files import replacing
from fcn_deploy.runtime.model_card import ModelCard, check_card
from torch import nn

TRACED = (64, 96)  # or two and three multiples, where those are larger
# Never traced: one pixel, primes, one side eight times the other, below and above the traced size.
VERIFIED_SIZES = (
    (1, 1), (2, 3), (7, 13), (31, 33), (37, 41), (17, 136), (136, 17), (61, 97), (127, 131), (101, 211),
    (128, 160), (200, 333), (257, 263), (320, 64),
)  # fmt: skip
MULTIPLES_TRIED = ((3, 5), (2, 1), (7, 4))
EXPORTERS = ("torchscript", "dynamo")
STRENGTHS = (1.0, 30.0, 1000.0)  # of noise, whose scores tell probabilities from logits
SECONDS = 180  # that an exporter may take; the symbolic arithmetic of one can go on for hours (windows of Swin)
ROOM_OF_NAME = 80  # characters of an error, beside the reasons
USUAL_STRIDE = 32  # of the coarsest map
DYNAMO_OLDEST = 18  # opset; asked for an older one, it writes this without a word

Note = Callable[[str], None]
Expected = list[tuple[np.ndarray, np.ndarray]]  # images, and the scores that PyTorch gives for them


@dataclass(frozen=True)
class SizeDifference:
    """How far ONNX and PyTorch are apart at one size.

    Attributes:
        size: (height, width) of the images.
        batch: how many there were.
        logits: the largest difference, as a share of the logits' range.
    """

    size: tuple[int, int]
    batch: int
    logits: float


def export_module(
    model: nn.Module,
    card: ModelCard | None,
    out: str | os.PathLike,
    *,
    exporter: str = "auto",
    opset_version: int = 18,
    name: str = "the module",
    options: ImportOptions | None = None,
    note: Note = lambda line: None,
) -> tuple[ModelCard, list[SizeDifference]]:
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
    options = options or ImportOptions()
    options.refuse_several("what export-onnx writes has one")
    if card is not None:
        options.refuse_beside_card(name, "modules")
    network = _network_of(model, card, options, name, note)
    if card is not None:
        check_card(card, network.channels, network.sizes.scores, name)
    exporters: Sequence[str] = (exporter,)
    if exporter == "auto":  # an exported program has no sizes of its own that a trace would see
        exporters = EXPORTERS[::-1] if is_program(network.module) else EXPORTERS
    exported = _first_that_holds(network, exporters, opset_version, options.fit_kind)
    for line in exported.notes:
        note(line)
    graph = exported.graph
    if (node := label_maker(graph)) is not None:
        raise DeployError(f"{name} gives labels by {label(node)}; it must give scores, before an argmax or a threshold")
    if card is None and options.activation is None and "activation" not in (options.card or {}):
        _refuse_other_kinds(network, graph)
    if card is None:
        graph, card = _assumed_card(network, graph, options, note)
    padded = exported.fit == "pad"
    card = replace(
        options.with_range(card, note),
        size_multiple=exported.sizes.multiple if padded else 1,
        smallest=exported.sizes.smallest if padded else 1,
        whole=exported.whole,
    )
    store_card(graph, card)
    with replacing(out) as temporary:
        temporary.write_bytes(graph.SerializeToString())
    return card, exported.differences


def _refuse_other_kinds(network: "_Network", graph: onnx.ModelProto) -> None:
    """Raise DeployError where what a module gives is no scores of classes, by its name and what is beside it."""
    if not isinstance(module := network.module, ScoresModule):
        return
    size = traced_size(network.sizes)
    given = [network.image(*size, strength) for strength in STRENGTHS]
    with torch.inference_mode():
        beside = [module.beside(image) for image in given]
        result = module(given[0]).numpy()
    (called, others), *_ = beside
    shares = [name for name in others if all(bool(((t[name] >= 0) & (t[name] <= 1)).all()) for _, t in beside)]
    shapes = {name: tuple(value.shape) for name, value in others.items()}
    output = graph.graph.output[0].name
    kind = kind_of_output(graph, output, result, size, shapes, called, shares)
    if kind is not None:
        raise refusal_of(kind, network.name, called or "its output", result.shape)


@dataclass(frozen=True)
class _Network:
    """What is traced of a module.

    Attributes:
        module: float32 [N,C,H,W] → [N,K,h,w], in eval mode.
        channels: C.
        sizes: that it takes.
        name: of the model, for errors.
        ours: whether it is one of fcn/, which pads and crops as its card says.
    """

    module: nn.Module
    channels: int
    sizes: AcceptedSizes
    name: str
    ours: bool

    def image(self, height: int, width: int, strength: float = 1.0) -> torch.Tensor:
        """An image of noise."""
        return strength * torch.randn(1, self.channels, height, width, generator=torch.Generator().manual_seed(0))

    def scores(self, height: int, width: int, strength: float = 1.0) -> np.ndarray | tuple[int, ...]:
        """What the module gives for an image of noise; () where that is no tensor."""
        with torch.inference_mode():
            result = self.module(self.image(height, width, strength))
        return result.numpy() if isinstance(result, torch.Tensor) else ()


def _network_of(model: nn.Module, card: ModelCard | None, options: ImportOptions, name: str, note: Note) -> _Network:
    # The exporters put modules back into the mode they came in.
    if isinstance(model, AnySize):
        if options.output is not None:
            raise MisuseError(f"{name} gives scores alone; omit --output {options.output}")
        if options.fit_size is not None:
            raise MisuseError(f"{name} takes every size by itself; omit --fit {options.fit}")
        sizes = AcceptedSizes(model.size_multiple, scores=model.architecture.classes)
        return _Network(_Multiples(model.eval()).eval(), model.architecture.channels, sizes, name, True)
    only, own = options.fit_size, likely_sizes(model)
    scores = scores_of(model, name, card.channels if card else None, options.output, note, [only] if only else own)
    network = _Network(scores.eval(), scores.channels, AcceptedSizes(), name, False)
    if only is not None:
        return replace(network, sizes=only_at(network.scores, name, only))
    try:
        return replace(network, sizes=find_accepted_sizes(network.scores, name))
    except DeployError as error:
        raise _of_one_size(network, own) or error from error


def _of_one_size(network: _Network, own: Sequence[tuple[int, int]]) -> DeployError | None:
    """What is said of a network that takes one size, or squares alone; `own`: sizes that it may take."""
    size = size_that_runs(network.scores, own)
    if size is None:
        return None
    height, width = size
    what = f"{height}×{width} only"
    if size_that_runs(network.scores, [(height, 2 * width), (2 * height, 2 * width)]) == (2 * height, 2 * width):
        what = f"squares only, such as {height}×{width}"
    remedy = f"--fit {height}x{width} resizes every image to that and its scores back, bilinearly, which is inexact"
    if isinstance(network.module, ScoresModule) and is_program(network.module.model):
        remedy = f"export the program with dynamic_shapes for N, H and W; or {remedy}"
    return DeployError(f"{network.name} takes {what}; {remedy}")


class _Multiples(nn.Module):
    """What is traced of our networks: all but padding and cropping, which are added to the graph."""

    def __init__(self, model: AnySize) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.at_multiples(x)


def _assumed_card(
    network: _Network, graph: onnx.ModelProto, options: ImportOptions, note: Note
) -> tuple[onnx.ModelProto, ModelCard]:
    """(the graph, that takes RGB; the card of a module that carries none)."""
    name, channels, sizes = network.name, network.channels, network.sizes
    if options.bgr:
        if channels != 3:
            raise MisuseError(f"--bgr is for images of 3 channels, and {name} takes {channels}")
        graph = reverse_channels(graph).model
        note(f"{name} wants BGR, as --bgr says: its channels are reversed, and the ONNX takes RGB")
    # A logit is a probability's number for weak noise by chance, and not for any.
    noise = [
        np.asarray(network.scores(*traced_size(sizes), strength))
        for strength in STRENGTHS[: 3 if sizes.scores == 1 else 1]
    ]
    score_range = float(min(scores.min() for scores in noise)), float(max(scores.max() for scores in noise))
    evidence = CardEvidence(channels, sizes.scores, score_range=score_range)
    card, assumed = card_of(graph, evidence, options, name)
    for line in assumed:
        note(line)
    return graph, replace(card, stride=_stride(graph, sizes))


def _stride(graph: onnx.ModelProto, sizes: AcceptedSizes) -> int:
    """Pixels from one coarse score to the next."""
    upsampling = find_end(graph).upsampling
    if upsampling.factor is not None:
        return max(round(upsampling.factor[0]), 1)
    if upsampling.mode == "none":
        return sizes.factor
    return score_stride(split_head(graph).model, sizes.multiple, sizes.smallest)


@dataclass(frozen=True)
class _Exported:
    """A graph that takes every size, as it was compared with PyTorch.

    Attributes:
        graph: with padding, resizing, upsampling and cropping.
        sizes: that the network is run at.
        fit: how images are fitted to the sizes that the network takes: one of FITS, or "".
        whole: as the card's.
        differences: from PyTorch, by size.
        notes: what was done, a line each.
    """

    graph: onnx.ModelProto
    sizes: AcceptedSizes
    fit: str
    whole: str
    differences: list[SizeDifference]
    notes: tuple[str, ...]


def _first_that_holds(network: _Network, exporters: Sequence[str], opset_version: int, fit: str | None) -> _Exported:
    """What the first of PyTorch's exporters gives that holds at every size. Raises DeployError."""
    reasons: dict[str, str] = {}
    graphs = []
    for exporter in exporters:
        try:
            graph, written = _to_graph(network, exporter, opset_version)
            graphs.append(clone(graph))
            exported = _at_every_size(network, graph, fit)
        except DeployError as error:
            reasons[exporter] = str(error)
            continue
        tried = [f"{network.name} is exported by {exporter}; {_joined(reasons)}"] if reasons else []
        return replace(exported, notes=(*tried, *written, *(() if network.ours else exported.notes)))
    if (sizes := _multiples_that_hold(network, graphs, opset_version)) is not None:
        note = (
            f"{network.name} has code that looks at the sizes of its maps, as padding of odd ones does; the ONNX does "
            f"what that does for multiples of {sizes.multiple}"
        )
        exported = _first_that_holds(replace(network, sizes=sizes), exporters, opset_version, fit)
        return replace(exported, notes=(note, *exported.notes))
    if len(reasons) == 1:
        raise DeployError(*reasons.values())
    raise DeployError(f"{network.name} cannot be exported: {_joined(reasons)}")


def _multiples_that_hold(
    network: _Network, graphs: Sequence[onnx.ModelProto], opset_version: int
) -> AcceptedSizes | None:
    """The least multiples, of those that a network takes, at which one of its graphs is it; None: there are none."""
    taken = network.sizes.multiple
    if network.ours or network.sizes.only is not None:
        return None
    for graph in (*graphs, *_traced_at_multiples(network, opset_version)):
        run = session(graph.SerializeToString())
        tried = (taken * times for times in PADDED_TO[1:])
        if (multiple := next((each for each in tried if _holds_at_multiples(network, run, each)), None)) is not None:
            return replace(network.sizes, multiple=multiple, by_choice=True)
    return None


def _traced_at_multiples(network: _Network, opset_version: int) -> Iterator[onnx.ModelProto]:
    """The graph as it is traced where no map is odd, unless that is how it was traced."""
    large = replace(network.sizes, multiple=network.sizes.multiple * USUAL_STRIDE)
    if any(side % large.multiple for side in traced_size(network.sizes)):
        with suppress(DeployError):
            yield _to_graph(replace(network, sizes=large), EXPORTERS[0], opset_version)[0]


def _holds_at_multiples(network: _Network, run, multiple: int) -> bool:
    """Whether ONNX Runtime gives PyTorch's scores at some sizes of a multiple."""
    for rows, columns in MULTIPLES_TRIED:
        least = -(-network.sizes.smallest // multiple) - 1
        size = (multiple * (least + rows), multiple * (least + columns))
        image = np.random.default_rng(0).standard_normal((1, network.channels, *size), dtype=np.float32)
        try:
            with torch.inference_mode():
                scores = network.module(torch.from_numpy(image)).numpy()
            ours = run_quietly(run, image)[0]
        except Exception:  # a size that is baked in
            return False
        if ours.shape != scores.shape or not np.abs(ours - scores).max() <= EXPORTED_MODEL * np.ptp(scores):
            return False
    return True


def _joined(reasons: Mapping[str, str]) -> str:
    """Why exporters failed, in what room an error has."""
    room = (MOST - ROOM_OF_NAME) // len(reasons)
    return "; ".join(f"by {exporter}: {brief(reason, room)}" for exporter, reason in reasons.items())


def _at_every_size(network: _Network, graph: onnx.ModelProto, fit: str | None) -> _Exported:
    """A graph that an exporter wrote, for every size; freed of the sizes that are baked in, where it has some.

    Raises:
        DeployError: it differs from PyTorch, with what is to blame.
    """
    try:
        return _fitted_and_verified(network, graph, fit)
    except DeployError as baked:
        if network.sizes.only is not None:
            raise
        try:
            set_shape(graph.graph.input[0], [1, network.channels, *traced_size(network.sizes)])
            freed = free_sizes(graph)
            exported = _fitted_and_verified(network, freed.model, fit)
        except Exception:  # tried: what was wrong before says more
            raise baked from None
        changes = [f"{network.name}: {change}" for change in freed.notes]
        return replace(exported, notes=(*changes, *exported.notes))


def _fitted_and_verified(network: _Network, graph: onnx.ModelProto, fit: str | None) -> _Exported:
    """The graph with what fits images of every size to it, compared with PyTorch. Raises DeployError."""
    sizes, name = padded_by_choice(graph, network.sizes, fit), network.name
    # The exporters name dimensions as they please, and leave known ones out.
    set_shape(graph.graph.input[0], ["N", network.channels, *(sizes.only or ("H", "W"))])
    set_shape(graph.graph.output[0], ["N", sizes.scores, "H", "W"])
    chosen, whole = choose_fit(graph, sizes, fit), global_operator(graph)
    made, notes = fit_images(graph, sizes, name, fit)
    made.producer_name = "fcn-deploy"
    onnx.checker.check_model(made)
    expected = expected_scores(network.module, sizes, chosen, network.channels, name)
    return _Exported(made, sizes, chosen, whole, verify(expected, made, name), tuple(notes))


def traced_size(sizes: AcceptedSizes) -> tuple[int, int]:
    """(height, width) of the image that the exporters run: of a size that the network takes, not square if it may."""
    if sizes.only is not None:
        return sizes.only

    def side(usual: int, count: int) -> int:
        return max(-(-usual // sizes.multiple), count) * sizes.multiple

    return (
        side(max(TRACED[0], sizes.smallest), 2),
        side(max(TRACED[1], sizes.smallest + sizes.multiple), 3),
    )


def _to_graph(network: _Network, exporter: str, opset_version: int) -> tuple[onnx.ModelProto, list[str]]:
    """The module as one of PyTorch's exporters writes it, of the opset that was asked for; and what was respelled."""
    if exporter == "dynamo" and opset_version < DYNAMO_OLDEST:
        raise DeployError(f"it writes opset {DYNAMO_OLDEST} and newer, not {opset_version}")
    export_with = _torchscript if exporter == "torchscript" else _dynamo
    module, mode = network.module, Exportable()
    if isinstance(module, ScoresModule):
        module.mode = mode
    try:
        with _quiet(), _within(SECONDS, exporter):
            graph = export_with(module, network.channels, network.sizes, opset_version)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the exporters wrap what happened in advice
            cause = cause.__cause__
        raise DeployError(f"{type(cause).__name__}: {one_line(cause, 300)}") from error
    finally:
        if isinstance(module, ScoresModule):
            module.mode = nullcontext()
    if opset(graph) != opset_version:
        raise DeployError(f"it wrote opset {opset(graph)} instead of {opset_version}")
    respelled = [f"{', '.join(sorted(mode.respelled))}: written as operators that take every size"]
    return fold_constants(graph).model, respelled if mode.respelled else []


def _torchscript(model: nn.Module, channels: int, sizes: AcceptedSizes, opset_version: int) -> onnx.ModelProto:
    buffer, image = io.BytesIO(), torch.zeros(1, channels, *traced_size(sizes))
    if is_script(model):  # freezing writes its calls and lists out, as the exporter wants them
        model = torch.jit.freeze(torch.jit.trace(model, image, check_trace=False).eval())
    free = {0: "N"} if sizes.only is not None else {0: "N", 2: "H", 3: "W"}
    torch.onnx.export(
        model,
        (image,),
        buffer,  # type: ignore[arg-type]  # its annotation forgets what its docstring allows
        dynamo=False,
        opset_version=opset_version,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": free, "logits": free},
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
        dynamic_shapes=(
            {0: batch} if sizes.only else {0: batch, 2: sizes.multiple * rows, 3: sizes.multiple * columns},
        ),
    )
    assert program is not None
    return program.model_proto


@contextmanager
def _within(seconds: int, exporter: str) -> Iterator[None]:
    """Raise TimeoutError where it takes longer; in the main thread alone, where Python lets that be done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*signal_and_frame) -> None:
        raise TimeoutError(f"{exporter} had not finished after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)  # again, where PyTorch takes the first for a failure of its own
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _quiet() -> Iterator[None]:
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


def expected_scores(
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
    most = 2 if behaviour.only is None or _takes_two(model, channels, behaviour.only) else 1
    for index, (height, width) in enumerate((traced_size(behaviour), *sizes)):
        batch = most if index % 5 == 0 and index else 1
        images = random.standard_normal((batch, channels, height, width), dtype=np.float32)
        with torch.inference_mode():
            try:
                expected.append((images, run(torch.from_numpy(images)).numpy()))
            except Exception as error:
                raise DeployError(f"{name} fails in PyTorch at {height}×{width}: {one_line(error)}") from error
    return expected


def _takes_two(model: nn.Module, channels: int, size: tuple[int, int]) -> bool:
    """Whether a network takes two images at once; programs that were exported for one do not."""
    try:
        with torch.inference_mode():
            return len(model(torch.zeros(2, channels, *size))) == 2
    except Exception:  # of whatever it is made of
        return False


def _any_size(model: nn.Module, sizes: AcceptedSizes, fit: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """In PyTorch, what the graph does: pad or resize, run, upsample, crop."""
    multiple, smallest = sizes.multiple, sizes.smallest

    def padded(x: torch.Tensor) -> torch.Tensor:
        size = x.shape[2:]
        down, right = (-(-max(side, smallest) // multiple) * multiple - side for side in size)
        logits = model(F.pad(x, (0, right, 0, down)))
        return (upsample(logits, sizes.factor) if sizes.factor > 1 else logits)[:, :, : size[0], : size[1]]

    def resized(x: torch.Tensor) -> torch.Tensor:
        size = list(x.shape[2:])
        nearest = [max((side + multiple // 2) // multiple * multiple, multiple, smallest) for side in size]
        nearest = nearest if sizes.only is None else list(sizes.only)
        return F.interpolate(model(F.interpolate(x, nearest, mode="bilinear")), size, mode="bilinear")

    return resized if fit == "resize" else padded


def verify(expected: Expected, graph: onnx.ModelProto, name: str) -> list[SizeDifference]:
    """Run ONNX Runtime beside what PyTorch gave, at all sizes but the first, which was traced.

    Raises:
        DeployError: they differ, or ONNX Runtime fails: names the node and the usual cause.
    """
    run = session(graph.SerializeToString())
    # The range of a single pixel's scores says little, so that of the traced size counts as well.
    usual = max(float(np.ptp(expected[0][1])), 1e-6)
    rounding = SIGMOID_ROUNDING if ends_in_sigmoid(graph) else 0.0
    differences = []
    for images, scores in expected[1:]:
        batch, _, height, width = images.shape
        try:
            logits = run_quietly(run, images)[0]
        except Exception as error:
            raise DeployError(
                f"{name} has a size baked in: it fails at {height}×{width}. {describe_cause(graph, one_line(error))}"
            ) from error
        if logits.shape != scores.shape:
            raise DeployError(
                f"{name} has a size baked in: at {height}×{width} it gives {list(logits.shape)} instead of "
                f"{list(scores.shape)}. {describe_cause(graph, '')}"
            )
        apart = max(float(np.abs(logits - scores).max()) - rounding, 0.0)
        difference = apart / max(float(np.ptp(scores)), usual)
        if not difference <= EXPORTED_MODEL:
            raise DeployError(
                f"{name} gives other scores in ONNX than in PyTorch: at {height}×{width} they differ by "
                f"{difference:.1e} of their range (limit {EXPORTED_MODEL:.0e}). {describe_cause(graph, '')}"
            )
        differences.append(SizeDifference((height, width), batch, difference))
    return differences
