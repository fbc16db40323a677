"""Fold the decision into a model: labels out."""

import numpy as np
from fcn_deploy.export.graph.edit import add_constants, clone, free_name, opset, rename_result
from fcn_deploy.runtime.model_card import ModelCard
from onnx import ModelProto, TensorProto, helper


def fold_head(model: ModelProto, card: ModelCard) -> ModelProto:
    """A model that gives `labels`, [N,H,W] in the card's label dtype, from one that gives logits [N,K,H,W]."""
    model = clone(model)
    output = model.graph.output[0]
    logits = output.name
    if logits == "labels":
        logits = "head/logits"
        rename_result(model, "labels", logits)
    free_name(model, "labels")
    kind = TensorProto.UINT8 if card.label_dtype == "uint8" else TensorProto.UINT16
    if card.activation != "softmax":
        threshold = np.array(card.score_threshold, np.float32)
        add_constants(model, {"head/threshold": threshold, "head/score_axis": np.array([1], np.int64)})
        axis = (["head/score_axis"], {}) if opset(model) >= 13 else ([], {"axes": [1]})
        steps = [
            ("Greater", [logits, "head/threshold"], "head/above", {}),
            ("Squeeze", ["head/above", *axis[0]], "head/best", axis[1]),
        ]
    else:
        steps = [("ArgMax", [logits], "head/best", {"axis": 1, "keepdims": 0})]
    steps.append(("Cast", ["head/best"], "labels", {"to": kind}))
    for operator, reads, out, extra in steps:
        name = out if out.startswith("head/") else f"head/{out}"
        model.graph.node.append(helper.make_node(operator, reads, [out], name=name, **extra))
    output.CopyFrom(helper.make_tensor_value_info("labels", kind, ["N", "H", "W"]))
    return model
