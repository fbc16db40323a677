"""The core of a model: what an engine runs, after its upsampling was cut off."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
from fcn_deploy.export.analysis.branches import first_branching
from fcn_deploy.export.analysis.map_shapes import score_stride
from fcn_deploy.export.build.golden import GOLDEN_SIZE
from fcn_deploy.export.graph.edit import check
from fcn_deploy.export.importer.import_model import ImportedModel
from fcn_deploy.export.passes.bilinear_deconv import bilinear_deconv
from fcn_deploy.export.passes.drop_idle import drop_idle
from fcn_deploy.export.passes.fold_constants import fold_constants
from fcn_deploy.export.passes.fold_scales import fold_scales
from fcn_deploy.export.passes.fuse_padding import fuse_padding
from fcn_deploy.export.passes.hard_sigmoid import hard_sigmoid
from fcn_deploy.export.passes.hard_swish import hard_swish
from fcn_deploy.export.passes.resize_by_factor import resize_by_factor
from fcn_deploy.export.passes.split_head import split_head
from fcn_deploy.runtime.backends.onnxruntime import ERRORS_ONLY, session
from fcn_deploy.runtime.engine_format.manifest import Head
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.engine_format.stage import Upsampling
from fcn_deploy.runtime.errors import DeployError, one_line
from fcn_deploy.runtime.onnx_model import adds_up_to_one
from fcn_deploy.runtime.pixels.noise_image import natural_noise
from fcn_deploy.runtime.pixels.prepare import prepare
from onnx import ModelProto


@dataclass(frozen=True)
class Core:
    """A model without its upsampling.

    Attributes:
        model: float32 `image` [N,C,H,W] → coarse `scores` [N,K,h,w].
        card: the model's, with the stride and the sizes of the core.
        upsampling: that was cut off; of mode `none` where it stays in the core.
        heads: of several outputs, whose scores follow one another.
    """

    model: ModelProto
    card: ModelCard
    upsampling: Upsampling
    heads: tuple[Head, ...] = ()


def core_of(imported: ImportedModel, fades: bool = True) -> Core:
    """The core of one output of a model, and the card that fits it.

    Args:
        imported: the model.
        fades: a bilinear transposed convolution at its end is cut off as a Resize, which gives the same labels.

    Raises:
        DeployError: its card is of another model.
    """
    model, card = imported.model, imported.card
    if fades and (card.activation == "softmax" or (card.activation, card.threshold) == ("sigmoid", 0.5)):
        model = bilinear_deconv(model).model
    split = split_head(fold_constants(model).model, labels=card.kind != "values")
    core, upsampling = split.model, split.upsampling
    for fuse in (fuse_padding, hard_sigmoid, fold_scales):
        core = fuse(core).model
    # What is seen at some sizes is not so at all where a branch may be taken at others.
    for at_multiples in (resize_by_factor, drop_idle) if first_branching(core) is None else ():
        core = at_multiples(core, split.size_multiple, split.smallest).model
    if split.sigmoid or upsampling.activated:
        if card.activation == "sigmoid":
            raise DeployError("the model ends in a Sigmoid, and its card says that it gives logits; mend the card")
        if card.activation == "probability" and split.sigmoid:
            card = replace(card, activation="sigmoid")
    # A model that takes the size it is given, or pads by itself, must not be padded by the runtime.
    card = replace(card, size_multiple=split.size_multiple, smallest=split.smallest)
    if upsampling.factor is not None:
        card = replace(card, stride=max(1, round(upsampling.factor[0])))
    elif upsampling.mode == "none":
        card = replace(card, stride=1)
    elif card.stride == 1:  # its own, where it says more
        card = replace(card, stride=score_stride(core, split.size_multiple, split.smallest))
    check(core, "the core network")
    if card.activation == "softmax" and not upsampling.activated:
        upsampling = replace(upsampling, activated=_gives_probabilities(core, card))
    return Core(core, card, upsampling)


def _gives_probabilities(core: ModelProto, card: ModelCard) -> bool:
    """Whether scores add up to one without a Softmax that is known: p and 1 - p, or a softmax in parts."""
    run = session(core.SerializeToString())
    image = prepare(natural_noise(*GOLDEN_SIZE, card, seed=0), card)
    try:
        return adds_up_to_one(run.run(None, {run.get_inputs()[0].name: image})[0][0])
    except Exception as error:
        raise DeployError(f"the network does not run: {one_line(error)}") from error


def optimise_offline(core: ModelProto) -> ModelProto:
    """A core, optimised as far as that holds on every machine. Raises DeployError.

    BASIC folds constants and batch norms. The levels above lay tensors out for the machine that runs them:
    ONNX Runtime does that when the engine is opened. It also writes HardSwish in parts, which is undone.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "core.onnx"
        options.optimized_model_filepath = str(path)
        try:
            onnxruntime.InferenceSession(core.SerializeToString(), options, providers=["CPUExecutionProvider"])
            optimised = onnx.load_from_string(path.read_bytes())
        except Exception as error:
            raise DeployError(f"ONNX Runtime cannot optimise the network: {one_line(error)}") from error
    return hard_swish(optimised).model
