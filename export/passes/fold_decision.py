"""Fold the decision into a model: labels out."""

import numpy as np
from fcn_deploy.export.graph.rewrite import Rewrite, declare, name_of
from fcn_deploy.export.passes.result import PassResult
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from onnx import ModelProto, TensorProto


def fold_decision(model: ModelProto, card: ModelCard) -> PassResult:
    """A model that gives `labels`, [N,H,W] in the card's label dtype, from one that gives logits [N,K,H,W]."""
    edit = Rewrite(model)
    logits = edit.result
    kind = TensorProto.UINT8 if card.label_dtype == "uint8" else TensorProto.UINT16
    if card.activation != "softmax":
        threshold = edit.constant("head/threshold", np.array(card.score_threshold, np.float32))
        above = edit.node("Greater", [logits, threshold], "head/above")
        if edit.opset >= 13:
            axis = edit.constant("head/score_axis", np.array([1], np.int64))
            best = edit.node("Squeeze", [above, axis], "head/best")
        else:
            best = edit.node("Squeeze", [above], "head/best", axes=[1])
    else:
        best = edit.node("ArgMax", [logits], "head/best", axis=1, keepdims=0)
    labels = edit.node("Cast", [best], "head/labels", to=kind)
    edit.end_with(labels, "head/logits" if logits.name == "labels" else name_of(logits), "labels")
    declare(labels, ["N", "H", "W"], kind)
    return PassResult(edit.model())
