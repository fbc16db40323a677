"""A PyTorch module written as ONNX: traced, made to take every size, verified, and given its card."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import onnx
from fcn_deploy.export.analysis.accepted_sizes import AcceptedSizes
from fcn_deploy.export.analysis.decision import label_maker
from fcn_deploy.export.analysis.map_shapes import score_stride
from fcn_deploy.export.analysis.model_end import find_end
from fcn_deploy.export.from_torch.every_size import first_that_holds
from fcn_deploy.export.from_torch.exporters import EXPORTERS
from fcn_deploy.export.from_torch.larger_sizes import compare_at_larger_sizes
from fcn_deploy.export.from_torch.network import Network, Note, find_random, network_of, traced_size
from fcn_deploy.export.from_torch.verify import SizeDifference, expected_scores
from fcn_deploy.export.graph.edit import label
from fcn_deploy.export.importer.card import CardEvidence, card_of, store_card
from fcn_deploy.export.importer.options import ImportOptions
from fcn_deploy.export.importer.output_kind import kind_of_output, refusal_of
from fcn_deploy.export.passes.reverse_channels import reverse_channels
from fcn_deploy.export.passes.split_head import split_head
from fcn_deploy.fcn.foreign import ScoresModule
from fcn_deploy.fcn.programs import is_program
from fcn_deploy.runtime.engine_format.model_card import ModelCard, check_card
from fcn_deploy.runtime.errors import DeployError, MisuseError
from fcn_deploy.runtime.files import replacing
from torch import nn

STRENGTHS = (1.0, 30.0, 1000.0)  # of noise, whose scores tell probabilities from logits
_exporting = threading.RLock()


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """PyTorch's exporters, and what stands for Python's names and PyTorch's functions meanwhile, are of the process."""
    with _exporting:
        yield


@_one_at_a_time()
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

    Nothing is written unless ONNX Runtime agrees with PyTorch at all of VERIFIED_SIZES. Threads of one process take
    turns.

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
    network = network_of(model, card, options, name, note)
    if card is not None:
        check_card(card, network.channels, network.sizes.scores, name)
    exporters: Sequence[str] = (exporter,)
    if exporter == "auto":  # an exported program has no sizes of its own that a trace would see
        exporters = EXPORTERS[::-1] if is_program(network.module) else EXPORTERS
    exported = first_that_holds(network, exporters, opset_version, options.fit_kind)
    for line in exported.notes:
        note(line)
    graph = exported.graph
    expected = expected_scores(network.module, exported.sizes, exported.fit, network.channels, name, ())
    if not expected.takes_two:
        note(f"{name} takes one image at a time, and so does what is written")
    for line in compare_at_larger_sizes(network, graph, expected, exported.sizes):
        note(line)
    if not network.ours and (line := find_random(network)):
        note(line)
    if (node := label_maker(graph)) is not None:
        raise DeployError(f"{name} gives labels by {label(node)}; it must give scores, before an argmax or a threshold")
    if card is None:
        scores = np.asarray(network.scores(*traced_size(network.sizes)))
        if options.activation is None and "activation" not in (options.card or {}):
            _refuse_other_kinds(network, graph, scores)
        graph, card = _assumed_card(network, graph, scores, options, note)
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


def _refuse_other_kinds(network: Network, graph: onnx.ModelProto, scores: np.ndarray) -> None:
    """Raise DeployError where what a module gives is no scores of classes, by its name and what is beside it.

    Args:
        scores: that it gave for noise of the traced size.
    """
    if not isinstance(module := network.module, ScoresModule):
        return
    size = traced_size(network.sizes)
    called, others = module.beside(network.image(*size))
    # Strong noise tells nothing of a network that gives one tensor, as none is beside it.
    beside = [others, *(module.beside(network.image(*size, each))[1] for each in STRENGTHS[1:] if others)]
    shares = [name for name in others if all(bool(((t[name] >= 0) & (t[name] <= 1)).all()) for t in beside)]
    shapes = {name: tuple(value.shape) for name, value in others.items()}
    kind = kind_of_output(graph, graph.graph.output[0].name, scores, size, shapes, called, shares)
    if kind is not None:
        raise refusal_of(kind, network.name, called or "its output", scores.shape)


def _assumed_card(
    network: Network, graph: onnx.ModelProto, scores: np.ndarray, options: ImportOptions, note: Note
) -> tuple[onnx.ModelProto, ModelCard]:
    """(the graph, that takes RGB; the card of a module that carries none); `scores`: as in _refuse_other_kinds."""
    name, channels, sizes = network.name, network.channels, network.sizes
    if options.bgr:
        if channels != 3:
            raise MisuseError(f"--bgr is for images of 3 channels, and {name} takes {channels}")
        graph = reverse_channels(graph).model
        note(f"{name} wants BGR, as --bgr says: its channels are reversed, and the ONNX takes RGB")
    # A logit is a probability's number for weak noise by chance, and not for any.
    stronger = STRENGTHS[1:] if sizes.scores == 1 else ()
    noise = [scores, *(np.asarray(network.scores(*traced_size(sizes), strength)) for strength in stronger)]
    score_range = float(min(each.min() for each in noise)), float(max(each.max() for each in noise))
    labels = isinstance(network.module, ScoresModule) and network.module.labels
    evidence = CardEvidence(channels, sizes.scores, score_range=score_range, labels=labels)
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
