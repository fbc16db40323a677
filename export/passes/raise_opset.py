"""Convert a model of an old operator set to a newer one."""

from fcn_deploy.export.analysis.branches import nodes_within
from fcn_deploy.export.graph.edit import attributes, clone, label, opset
from fcn_deploy.export.passes.result import PassResult
from fcn_deploy.runtime.errors import DeployError, one_line
from onnx import ModelProto, helper, version_converter

WANTED = 18  # what our own nodes, Q/DQ and casts are written in


def raise_opset(model: ModelProto, version: int = WANTED) -> PassResult:
    """An equal model of at least this operator set, by onnx's converter, mended where that errs.

    Raises:
        DeployError: it cannot be converted.
    """
    old = opset(model)
    if old >= version:
        return PassResult(model, why_not=f"it is of opset {old}")
    model = clone(model)
    del model.graph.value_info[:]
    for node, _ in nodes_within(model.graph.node):
        if node.op_type == "BatchNormalization" and old < 14:
            if attributes(node).get("spatial", 1) != 1:
                raise DeployError(f"node {label(node)} has statistics per pixel")
            del node.output[1:]  # of training
            kept = [item for item in node.attribute if item.name in ("epsilon", "momentum")]
            del node.attribute[:]
            node.attribute.extend(kept)
    try:
        raised = version_converter.convert_version(model, version)
    except Exception as error:  # onnx's errors share no base class
        raise DeployError(
            f"it is of opset {old}, and onnx cannot convert it to {version} ({one_line(error, 200)}): "
            f"export it again at opset {version} or newer"
        ) from error
    for node, _ in nodes_within(raised.graph.node):
        if node.op_type == "Resize" and old < 11:
            # Until then, as Upsample too, it read cells from the corner and rounded down; the converter forgets.
            kept = [item for item in node.attribute if item.name == "mode"]
            del node.attribute[:]
            node.attribute.extend(kept)
            node.attribute.append(helper.make_attribute("coordinate_transformation_mode", "asymmetric"))
            node.attribute.append(helper.make_attribute("nearest_mode", "floor"))
    return PassResult(raised, (f"is of opset {old}; it is converted to {opset(raised)}",))
