"""An ONNX for Deepness, a plugin of QGIS: probabilities out, at one tile size, with the metadata that it reads.

The keys, and what the plugin does with them, are those of its version 0.6.5: it shows the network (pixels / 255 − mean)
/ std, sets what is below the threshold to 0 and takes the argmax, of square tiles whose side it reads from the input.
"""

import json
from pathlib import Path

import numpy as np
import onnx
from fcn_deploy.export.graph.edit import check, opset, set_metadata, set_shape
from fcn_deploy.export.graph.rewrite import Rewrite, declare, name_of
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.errors import DeployError, MisuseError
from fcn_deploy.runtime.files import replacing
from onnx import ModelProto

OVERLAP = 15  # percent of a tile: the plugin's own default


def write_for_deepness(path: Path, card: ModelCard, resolution: float, tile: int) -> None:
    """Replace an ONNX of any size, `image` → `logits`, by one for Deepness.

    Args:
        path: of the ONNX, as export-onnx writes it.
        card: of the model.
        resolution: centimetres of ground that a pixel shows.
        tile: side of a tile, in pixels.

    Raises:
        MisuseError: a model whose scores or images Deepness does not take.
        DeployError: the result does not give the model's labels.
    """
    if card.kind != "labels":
        raise MisuseError(f"--deepness is of labels, and this model gives {card.kind}; omit it")
    if card.dtype != "uint8":
        raise MisuseError(f"--deepness takes images of 8 bits, and this model takes {card.dtype}; omit it")
    if tile % card.size_multiple or tile < card.smallest:
        raise MisuseError(f"--tile-size {tile}; this model needs a multiple of {card.size_multiple}")
    before = onnx.load(path)
    if opset(before) < 13 and card.activation == "softmax":
        raise MisuseError(
            f"--deepness adds a Softmax of opset 13 or newer, and {path} is of {opset(before)}; use --opset 18"
        )
    model = _with_probabilities(before, card)
    set_shape(model.graph.input[0], [1, card.channels, tile, tile])
    set_shape(model.graph.output[0], [1, card.scores, tile, tile])
    for key, value in _metadata(card, resolution, tile).items():
        set_metadata(model, key, json.dumps(value))
    check(model, "the model for Deepness")
    _compare(before, model, card, tile)
    with replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def _with_probabilities(model: ModelProto, card: ModelCard) -> ModelProto:
    """Scores become probabilities: the plugin sets what is below 0, as logits are, to 0."""
    if card.activation == "probability":
        return ModelProto.FromString(model.SerializeToString())
    edit = Rewrite(model)
    logits = edit.result
    if card.activation == "sigmoid":
        result = edit.node("Sigmoid", [logits], "probabilities")
    else:
        result = edit.node("Softmax", [logits], "probabilities", axis=1)
    edit.end_with(result, name_of(logits), "probabilities")
    declare(result, ["N", card.scores, "H", "W"])
    return edit.model()


def _metadata(card: ModelCard, resolution: float, tile: int) -> dict[str, object]:
    one_score = card.scores == 1
    return {
        "model_type": "Segmentor",
        "class_names": {str(index): name for index, name in enumerate(card.classes)},
        "resolution": resolution,
        "tile_size": tile,
        "tiles_overlap": OVERLAP,
        "standardization_mean": [value / 255 for value in card.mean],
        "standardization_std": [value / 255 for value in card.std],
        # 0: none, so that the largest wins; of one score it makes the label.
        "seg_thresh": card.thresholds[0] if one_score else 0,
        "seg_small_segment": 0,
    }


def _compare(before: ModelProto, model: ModelProto, card: ModelCard, tile: int) -> None:
    """Raise DeployError where the model's probabilities are not those of the logits it had."""
    image = np.random.default_rng(0).normal(size=(1, card.channels, tile, tile)).astype(np.float32)
    logits, found = (
        session(each.SerializeToString(), None).run(None, {each.graph.input[0].name: image})[0]
        for each in (before, model)
    )
    if card.activation == "softmax":
        logits = np.exp(logits - logits.max(axis=1, keepdims=True))
        logits /= logits.sum(axis=1, keepdims=True)
    elif card.activation == "sigmoid":
        logits = 1 / (1 + np.exp(-logits))
    if found.shape != logits.shape or np.abs(found - logits).max() > 1e-4:
        raise DeployError("the model for Deepness does not give the model's probabilities; please report it")
