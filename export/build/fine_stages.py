"""Stages for tiles alone: an engine's core cut further, so that halos are small, with no weights of its own.

Whole images are run by the engine's own stages, at no cost of more cuts; images that memory does not hold by these.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx
from fcn_deploy.export.build.cut_stages import Part, cut_core, members_of
from fcn_deploy.export.build.draft import Draft
from fcn_deploy.export.passes.dequantize_late import dequantize_late
from fcn_deploy.export.tolerances import REORDERED_SUMS
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.engine_format.stage import Stage
from fcn_deploy.runtime.network import Network
from fcn_deploy.runtime.pixels.noise_image import natural_noise
from fcn_deploy.runtime.pixels.prepare import padded_size
from fcn_deploy.runtime.planning.grid import grid_of, unit_of
from fcn_deploy.runtime.planning.plan import Plan
from onnx import ModelProto, TensorProto

MOST_STAGES = 6
LEAST_BYTES = 256  # of weights that are left to another file
TRIED_SIDE, TRIED_TILE = 640, 256  # pixels: of the image that they are tried on, and of its tiles, about


def with_fine_stages(
    draft: Draft, core: ModelProto, on_image: Callable[[tuple[Part, ...]], tuple[Part, ...] | None], threads: int | None
) -> Draft:
    """The engine with stages for tiles alone; as it is where these would be no more, or their scores others.

    Args:
        draft: an engine for CPUs.
        core: that its stages are parts of, as it takes normalised images.
        on_image: its parts as they take images like the engine's first stage; None: that cannot be.
        threads: of a run.
    """
    manifest = draft.manifest
    if manifest.backend != "onnxruntime" or manifest.card.whole or any(s.halo is None for s in manifest.stages):
        return draft  # OpenVINO takes no weights from elsewhere in memory, and has no arena that networks share
    parts = on_image(cut_core(dequantize_late(core).model, manifest.card, MOST_STAGES))
    if parts is None or len(parts) <= len(manifest.stages) or any(part.stage.halo is None for part in parts):
        return draft
    named = [replace(part, stage=replace(part.stage, file=f"fine-{i}.onnx")) for i, part in enumerate(parts)]
    files = {stage.file: draft.members[stage.file] for stage in manifest.stages}
    members = members_of([replace(part, model=without_weights(part.model, files)) for part in named])
    changed = Draft(replace(manifest, fine=tuple(part.stage for part in named)), {**draft.members, **members})
    with changed.opened(threads) as net:
        return changed if _gives_the_same(net) else draft


def without_weights(model: ModelProto, files: Mapping[str, bytes]) -> ModelProto:
    """The model whose weights are read from files that hold the same bytes, as ONNX's external data."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for tensor in changed.graph.initializer:
        data = tensor.raw_data
        if len(data) < LEAST_BYTES:
            continue
        place = next(((name, at) for name, content in files.items() if (at := content.find(data)) >= 0), None)
        if place is None:
            continue
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", place[0]), ("offset", place[1]), ("length", len(data))):
            tensor.external_data.add(key=key, value=str(value))
    return changed


def _gives_the_same(net: Network) -> bool:
    """Whether tiles by these stages give the scores of a whole image, as float32 rounds."""
    assert net.manifest is not None
    card, stages = net.card, net.manifest.fine
    size = TRIED_SIDE, TRIED_SIDE - 1
    image = natural_noise(*size, card, seed=0)
    whole = net.scores_by(image, Plan(size, padded_size(*size, card), 0))
    tiled = net.scores_by(image, tried_plan(size, card, stages))
    return tiled.shape == whole.shape and bool(np.abs(tiled - whole).max() <= REORDERED_SUMS * float(np.ptp(whole)))


def tried_plan(size: tuple[int, int], card: ModelCard, stages: Sequence[Stage]) -> Plan:
    """Tiles of an image that are small, whatever memory there is."""
    padded = padded_size(*size, card)
    sides = (math.ceil(TRIED_TILE / unit_of(stage, card)) * unit_of(stage, card) for stage in stages)
    grids = tuple(grid_of(padded, (side, side), stage, card) for stage, side in zip(stages, sides, strict=True))
    return Plan(size, padded, 0, grids=grids, fine=True)
