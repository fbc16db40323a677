"""Several outputs of one network as one core: what they share once, and their scores one after the other."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from fcn_deploy.export.analysis.accepted_sizes import run_quietly
from fcn_deploy.export.build.core import Core, core_of
from fcn_deploy.export.graph.edit import (
    Names,
    add_constants,
    check,
    clone,
    free_name,
    opset,
    prune,
    rename_reads,
    set_shape,
)
from fcn_deploy.export.importer.import_model import ImportedModel
from fcn_deploy.export.passes.nearest_as_pytorch import nearest_as_pytorch
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.engine_format.manifest import Head
from fcn_deploy.runtime.engine_format.stage import PYTORCH, Upsampling
from fcn_deploy.runtime.errors import DeployError
from onnx import ModelProto, helper
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateHashedInitializersPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
)

LARGEST_SHARED = 1 << 40  # values of a weight that is looked for twice
SIZES_TRIED = (1, 4, 6)  # multiples beyond the least, at which maps are to be of one size


def core_of_heads(imported: ImportedModel) -> Core:
    """The core of a model and of its further outputs, whose scores [N, K₀ + K₁ + …, h, w] are one after the other.

    Where all are enlarged alike, they are coarse, and enlarged by the runtime; else each is enlarged in the core.

    Raises:
        DeployError: as core_of, or outputs that want images of different sizes.
    """
    models = (imported, *imported.further)
    cores = [core_of(each) for each in models]
    sizes = {(core.card.size_multiple, core.card.smallest) for core in cores}
    if len(sizes) > 1:
        raise DeployError("the outputs want images padded to different sizes; build an engine for each")
    alike = {(replace(core.upsampling, activated=False), core.card.stride) for core in cores}
    if len(alike) > 1 or len({_cells(core) for core in cores}) > 1:
        cores = [_enlarged(core_of(each, fades=False)) for each in models]
    heads = tuple(
        Head.of(each.output, core.card, core.upsampling.activated) for each, core in zip(models, cores, strict=True)
    )
    model = _joined([core.model for core in cores], sum(core.card.scores for core in cores))
    card = replace(cores[0].card, whole=next((core.card.whole for core in cores if core.card.whole), ""))
    card = replace(card, alone=next((core.card.alone for core in cores if core.card.alone), ""))
    return Core(model, card, cores[0].upsampling, heads)


def _cells(core: Core) -> tuple[tuple[int, ...], ...]:
    """How large the maps of scores are, of images of some sizes."""
    run, multiple = session(core.model.SerializeToString()), core.card.size_multiple
    least = -(-core.card.smallest // multiple)
    sides = [(least + more) * multiple for more in SIZES_TRIED]
    images = [np.zeros((1, core.card.channels, *size), np.float32) for size in zip(sides, reversed(sides), strict=True)]
    return tuple(run_quietly(run, image)[0].shape[2:] for image in images)


def _enlarged(core: Core) -> Core:
    """The core with its upsampling in it: scores of the padded image's size."""
    upsampling, full = core.upsampling, replace(core.card, stride=1)
    if upsampling.mode == "none":
        return Core(core.model, full, upsampling)
    model = clone(core.model)
    name, cells = Names(model), model.graph.output[0].name
    settings = {"mode": upsampling.mode, "coordinate_transformation_mode": upsampling.coordinates}
    if upsampling.mode == "nearest":
        settings["nearest_mode"] = "floor" if upsampling.rounding == PYTORCH else upsampling.rounding
    values = {"0": np.array([0]), "2": np.array([2]), "4": np.array([4]), "axes": np.array([2, 3])}
    values |= {"start": np.array([0, 0]), "factors": np.array([1, 1, *(upsampling.factor or ())], np.float32)}

    def node(operator: str, reads: Sequence[str], result: str, **attributes: Any) -> str:
        """Append an operator, which reads values of the network or of the above; the name of its result."""
        own = [name(f"enlarged/{read}") if read in values else read for read in reads]
        result = name(f"enlarged/{result}")
        add_constants(model, {each: values.pop(read) for read, each in zip(reads, own, strict=True) if read in values})
        model.graph.node.append(helper.make_node(operator, own, [result], name=result, **attributes))
        return result

    size = node("Slice", [node("Shape", [model.graph.input[0].name], "shape"), "2", "4"], "size")
    if upsampling.factor is None:
        kept = node("Slice", [node("Shape", [cells], "cells"), "0", name("enlarged/2")], "kept")
        large = node("Resize", [cells, "", "", node("Concat", [kept, size], "wanted", axis=0)], "map", **settings)
    else:
        large = node("Resize", [cells, "", "factors"], "map", **settings)
        if any(core.card.size_multiple % factor for factor in upsampling.factor):  # cells that reach beyond the image
            large = node("Slice", [large, "start", size, "axes"], "cropped")
    model.graph.output[0].name = large
    set_shape(model.graph.output[0], ["N", core.card.scores, "H", "W"])
    prune(model)
    if upsampling.rounding == PYTORCH:
        model = nearest_as_pytorch(model, core.card.size_multiple, core.card.smallest).model
    return Core(model, full, Upsampling(activated=upsampling.activated))


def _joined(models: Sequence[ModelProto], channels: int) -> ModelProto:
    """Networks of one image as one, `image` → `scores`, that does what they share once."""
    version = max(opset(model) for model in models)
    image = models[0].graph.input[0].name
    whole = clone(models[0])
    results = [whole.graph.output[0].name]
    for index, model in enumerate(models[1:], 1):
        other = onnx.compose.add_prefix(model, f"head{index}/", inplace=False)
        rename_reads(other, other.graph.input[0].name, image)
        whole.graph.node.extend(other.graph.node)
        whole.graph.initializer.extend(other.graph.initializer)
        results.append(other.graph.output[0].name)
        if opset(model) != version or opset(whole) != version:
            raise DeployError("its outputs are of different opsets; build an engine for each")
    free_name(whole, "scores")
    results = [f"{name}/renamed" if name == "scores" else name for name in results]
    whole.graph.node.append(helper.make_node("Concat", results, ["scores"], name="scores", axis=1))
    del whole.graph.output[1:], whole.graph.value_info[:]
    whole.graph.output[0].name = "scores"
    set_shape(whole.graph.output[0], ["N", channels, "h", "w"])
    shared = ir.from_proto(whole)
    for pass_ in (
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        DeduplicateHashedInitializersPass(size_limit=LARGEST_SHARED),
        CommonSubexpressionEliminationPass(size_limit=0),
        RemoveUnusedNodesPass(),
    ):
        pass_(shared)
    made: ModelProto = ir.to_proto(shared)
    check(made, "the network of several outputs")
    return made
