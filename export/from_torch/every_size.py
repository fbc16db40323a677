"""The search for a graph that takes every size: of which exporter, freed of which sizes, run at which multiples."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import onnx
import torch
from fcn_deploy.export.analysis.accepted_sizes import AcceptedSizes, run_quietly
from fcn_deploy.export.analysis.near_ties import ROUNDED, picks_places
from fcn_deploy.export.analysis.receptive_field import global_operator
from fcn_deploy.export.dynamic_shapes.free_sizes import free_sizes
from fcn_deploy.export.from_torch.exporters import EXPORTERS, to_graph
from fcn_deploy.export.from_torch.network import Network, traced_size
from fcn_deploy.export.from_torch.verify import VERIFIED_SIZES, SizeDifference, expected_scores, verify
from fcn_deploy.export.graph.edit import clone, set_shape, sign
from fcn_deploy.export.importer.fit_images import PADDED_TO, choose_fit, fit_images, padded_by_choice
from fcn_deploy.export.importer.limits import refuse_changing
from fcn_deploy.export.passes.nearest_as_pytorch import nearest_as_pytorch
from fcn_deploy.export.tolerances import EXPORTED_MODEL
from fcn_deploy.fcn.programs import is_program, is_script
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.errors import MOST, DeployError, brief

ROOM_OF_NAME = 80  # characters of an error, beside the reasons
USUAL_STRIDE = 32  # of the coarsest map
LARGEST_MULTIPLE = 256  # images of more than a few megapixels take what memory there is
MULTIPLES_TRIED = ((3, 5), (2, 1), (7, 4))


@dataclass(frozen=True)
class Exported:
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


def first_that_holds(network: Network, exporters: Sequence[str], opset_version: int, fit: str | None) -> Exported:
    """What the first of PyTorch's exporters gives that holds at every size. Raises DeployError."""
    reasons: dict[str, str] = {}
    graphs: list[onnx.ModelProto] = []
    for exporter, numbers in _attempts(network, exporters):
        try:
            graph, written = to_graph(network, exporter, opset_version, numbers)
        except DeployError as error:
            reasons.setdefault(exporter, str(error))
            continue
        refuse_changing(graph, network.name)
        if graph in graphs:  # no number was made of a size
            continue
        graphs.append(clone(graph))
        try:
            exported = _at_every_size(network, graph, fit)
        except DeployError as error:
            reasons.setdefault(exporter, str(error))
            continue
        others = {} if exporter in reasons else reasons
        tried = [f"{network.name} is exported by {exporter}; {_joined(others)}"] if others else []
        return replace(exported, notes=(*tried, *written, *(() if network.ours else exported.notes)))
    if (sizes := _multiples_that_hold(network, graphs, opset_version)) is not None:
        note = (
            f"{network.name} has code that looks at the sizes of its maps, as padding of odd ones does; the ONNX does "
            f"what that does for multiples of {sizes.multiple}; other sizes, which the module may take by itself, get "
            "the scores of the padded or resized image"
        )
        exported = first_that_holds(replace(network, sizes=sizes), exporters, opset_version, fit)
        return replace(exported, notes=(note, *exported.notes))
    if len(reasons) == 1:
        raise DeployError(*reasons.values())
    raise DeployError(f"{network.name} cannot be exported: {_joined(reasons)}")


def _attempts(network: Network, exporters: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """(exporter, whether numbers that Python makes of sizes stay functions of them), in the order of trying."""
    of_python = not (network.ours or network.sizes.only or is_program(network.module) or is_script(network.module))
    for exporter in exporters:
        yield exporter, False
        if exporter == "torchscript" and of_python:
            yield exporter, True


def _multiples_that_hold(
    network: Network, graphs: Sequence[onnx.ModelProto], opset_version: int
) -> AcceptedSizes | None:
    """The least multiples, of those that a network takes, at which one of its graphs is it; None: there are none."""
    sizes = network.sizes
    if network.ours or sizes.by_choice or sizes.only is not None:
        return None
    for graph in (*graphs, *_traced_at_multiples(network, opset_version)):
        try:
            run = session(graph.SerializeToString())
        except DeployError:  # as each attempt has said
            continue
        multiples = (sizes.multiple * times for times in PADDED_TO[1:])
        tried = (multiple for multiple in multiples if multiple <= LARGEST_MULTIPLE)
        if (multiple := next((each for each in tried if _holds_at_multiples(network, run, each)), None)) is not None:
            return replace(sizes, multiple=multiple, by_choice=True)
    return None


def _traced_at_multiples(network: Network, opset_version: int) -> Iterator[onnx.ModelProto]:
    """The graph as it is traced where no map is odd, unless that is how it was traced."""
    multiple = network.sizes.multiple
    large = replace(network.sizes, multiple=multiple * min(USUAL_STRIDE, max(LARGEST_MULTIPLE // multiple, 1)))
    if any(side % large.multiple for side in traced_size(network.sizes)):
        with suppress(DeployError):
            yield to_graph(replace(network, sizes=large), EXPORTERS[0], opset_version)[0]


def _holds_at_multiples(network: Network, run, multiple: int) -> bool:
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


def _at_every_size(network: Network, graph: onnx.ModelProto, fit: str | None) -> Exported:
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


def _fitted_and_verified(network: Network, graph: onnx.ModelProto, fit: str | None) -> Exported:
    """The graph with what fits images of every size to it, compared with PyTorch. Raises DeployError."""
    sizes, name = padded_by_choice(graph, network.sizes, fit), network.name
    # The exporters name dimensions as they please, and leave known ones out.
    set_shape(graph.graph.input[0], ["N", network.channels, *(sizes.only or ("H", "W"))])
    set_shape(graph.graph.output[0], ["N", sizes.scores, "H", "W"])
    nearest = nearest_as_pytorch(graph, sizes.multiple, sizes.smallest)
    chosen, whole = choose_fit(nearest.model, sizes, fit), global_operator(nearest.model)
    made, notes = fit_images(nearest.model, sizes, name, fit)
    sign(made)
    onnx.checker.check_model(made)
    seen = (*VERIFIED_SIZES, *nearest.ties)
    expected = expected_scores(network.module, sizes, chosen, network.channels, name, seen)
    differences = verify(expected, made, name, graph)
    if picks_places(graph):
        notes = [*notes, f"{name} uses the places of maxima: {ROUNDED}"]
    return Exported(made, sizes, chosen, whole, differences, tuple(notes))
