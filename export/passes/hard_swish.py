"""x · HardSigmoid(x) as HardSwish, which OpenVINO runs as a part of the convolution before it."""

import math

import onnx_ir as ir
from fcn_deploy.export.graph.rewrite import Rewrite, name_of, needed_input
from fcn_deploy.export.passes.result import PassResult
from onnx import ModelProto

SLOPE, SHIFT, OPSET = 1 / 6, 0.5, 14  # of HardSwish, and where it begins


def hard_swish(model: ModelProto) -> PassResult:
    """An equal model, up to rounding, with HardSwish for each product of a value and its own HardSigmoid.

    ONNX Runtime writes HardSwish as that product when it optimises a model, and runs either alike. OpenVINO knows the
    whole, and takes a pass over the map for each of its parts.
    """
    edit, found = Rewrite(model), 0
    for node in [each for each in edit.graph if each.op_type == "Mul"] if edit.opset >= OPSET else []:
        place = next((place for place in (0, 1) if _is_share_of(node.inputs[place], node.inputs[1 - place])), None)
        if place is None:
            continue
        result = name_of(node.outputs[0])
        swish = edit.node("HardSwish", [needed_input(node, 1 - place)], f"{result}/hard_swish", before=node)
        edit.replace(node.outputs[0], swish)
        found += 1
    if not found:
        return PassResult(model, why_not="no value is multiplied by its own HardSigmoid")
    edit.prune()
    return PassResult(edit.model())


def _is_share_of(value: ir.Value | None, whole: ir.Value | None) -> bool:
    """Whether a value is the HardSigmoid of `whole`, of HardSwish's slope and shift."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "HardSigmoid" or node.inputs[0] is not whole:
        return False
    slope, shift = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
    return math.isclose(slope, SLOPE, rel_tol=1e-6) and math.isclose(shift, SHIFT, rel_tol=1e-6)
