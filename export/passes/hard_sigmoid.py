"""x · Clip(x + 3, 0, 6) / 6, as exporters write a hard swish of four operators, by HardSigmoid."""

import numpy as np
import onnx_ir as ir
from fcn_deploy.export.graph.rewrite import Rewrite, constant, input_of, name_of, needed_input
from fcn_deploy.export.passes.result import PassResult
from onnx import ModelProto


def hard_sigmoid(model: ModelProto) -> PassResult:
    """An equal model, up to rounding, in which Clip(x + b, 0, c) / c is HardSigmoid(x), also behind a product.

    PaddlePaddle's exporter and PyTorch's, before opset 14, write four operators, each a pass over the map.
    """
    edit, found = Rewrite(model), 0
    for node in [each for each in edit.graph if each.op_type in ("Div", "Mul")]:
        if (factor := _factor(node)) is None:
            continue
        value = needed_input(node, factor[0])
        clip, other = _clipped(value, factor[1]), None
        if clip is None and (product := value.producer()) is not None and product.op_type == "Mul":
            if len(value.uses()) != 1 or value.is_graph_output():
                continue
            place = next((at for at in (0, 1) if _clipped(product.inputs[at], factor[1]) is not None), None)
            if place is None:
                continue
            clip, other = _clipped(product.inputs[place], factor[1]), product.inputs[1 - place]
        if clip is None:
            continue
        x, shift = clip
        name = name_of(node.outputs[0])
        alpha, beta = 1 / factor[1], shift / factor[1]
        share = edit.node("HardSigmoid", [x], f"{name}/hard_sigmoid", before=node, alpha=alpha, beta=beta)
        edit.replace(
            node.outputs[0],
            share if other is None else edit.node("Mul", [other, share], f"{name}/product", before=node),
        )
        found += 1
    if not found:
        return PassResult(model, why_not="no sum is clipped to 0 and its divisor")
    edit.prune()
    return PassResult(edit.model())


def _factor(node: ir.Node) -> tuple[int, float] | None:
    """(which input is divided, by what number) of a Div, or of a Mul by its inverse; None: of neither."""
    for place in (0,) if node.op_type == "Div" else (0, 1):
        number = _number(node.inputs[1 - place])
        if number:
            return place, number if node.op_type == "Div" else float(np.float32(1 / number))
    return None


def _clipped(value: ir.Value | None, top: float) -> tuple[ir.Value, float] | None:
    """(x, b) of a value that is Clip(x + b, 0, top) and read once; None: it is not."""
    clip = None if value is None else value.producer()
    if value is None or clip is None or clip.op_type != "Clip" or len(value.uses()) != 1 or value.is_graph_output():
        return None
    low, high = (_number(input_of(clip, place)) for place in (1, 2))
    total = needed_input(clip).producer()
    if low != 0 or high is None or abs(high - top) > 1e-6 * top or total is None or total.op_type != "Add":
        return None
    for place in (0, 1):
        x = total.inputs[1 - place]
        if (shift := _number(total.inputs[place])) is not None and x is not None:
            return x, shift
    return None


def _number(value: ir.Value | None) -> float | None:
    """The one number of a float32 constant that broadcasts to whatever it meets; None: it is another."""
    found = constant(value)
    return (
        float(found.reshape(-1)[0])
        if found is not None and found.size == 1 and found.ndim < 2 and (found.dtype == np.float32)
        else None
    )
