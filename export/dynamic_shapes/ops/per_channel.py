"""Convolutions and normalisations per channel: that their weights are for as many channels as they are given.

And that a convolution is not dilated by shares of the traced map.
"""

from fcn_deploy.export.dynamic_shapes.sizes import axis_sizes, fixed, is_fixed, multiplied
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State, name_of_node
from fcn_deploy.export.graph.edit import attributes
from onnx import NodeProto

PER_GROUP = 21  # before this opset, GroupNormalization has weights per group


def check(node: NodeProto, state: State) -> None:
    weight = state.shape(node.input[1])
    channels = multiplied(state.shape(node.input[0])[1])
    if node.op_type == "GroupNormalization" and state.graph.opset < PER_GROUP:
        return
    taken = multiplied(weight[0])
    if node.op_type in ("Conv", "ConvInteger", "DeformConv"):
        taken = multiplied([*weight[1], fixed(attributes(node).get("group", 1))])
    if channels != taken:
        raise ConflictError(node, f"it has weights for {taken[0]} channels, and is given a number that changes")
    _refuse_shares(node, state)


def _refuse_shares(node: NodeProto, state: State) -> None:
    """Raise ConflictError where dilations are to each other as the sides of the traced map are."""
    sides, dilations = axis_sizes(state.shape(node.input[0]))[2:], uneven_dilations(node)
    if not state.graph.traced or len(dilations) != 2 or any(map(is_fixed, sides)):
        return
    (height, *_), (width, *_) = sides
    name = name_of_node(node)
    if dilations[0] * width == dilations[1] * height and state.graph.assumed.get(name) != "fixed":
        raise ConflictError(
            node,
            f"its dilations of {dilations[0]}×{dilations[1]} are shares of the traced map, most likely; "
            f"--assume {name}=fixed if meant",
        )


def uneven_dilations(node: NodeProto) -> list[int]:
    """Dilations of a convolution that is dilated more one way than the other; [] of others.

    One along which the kernel has a single cell does nothing, as in ERFNet's kernels of 1×3 dilated by 1×2.
    """
    settings = attributes(node)
    dilations: list[int] = settings.get("dilations", [])
    return dilations if len(set(dilations)) > 1 and 1 not in settings.get("kernel_shape", []) else []
