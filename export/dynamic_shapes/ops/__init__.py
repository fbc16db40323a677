"""What is known of each operator, a file for each family, under the same names in all of them:

- `propagate(node, state)`: the shapes of its outputs, its numbers taken as they stand; where ONNX's own inference loses
  an axis's factors.
- `check(node, state)`: raises ConflictError for what ONNX's inference leaves to the runtime, such as weights that fit.
- `interpret(node, state)`: what its numbers can stand for at other sizes, the likeliest first; None: what they are.
- `assume(node, state)`: what is taken for granted where it stays as it is, and a multiple that H and W must be of.

To free an operator's numbers, write its family's file, and name the operator here.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fcn_deploy.export.dynamic_shapes import size_numbers
from fcn_deploy.export.dynamic_shapes.interpretation import Interpretation
from fcn_deploy.export.dynamic_shapes.ops import (
    along_axes,
    broadcasting,
    concat,
    conv_transpose,
    division,
    einsum,
    expand,
    flatten,
    gather,
    grid_sample,
    layer_normalization,
    matmul,
    padding,
    per_channel,
    pooling,
    recurrent,
    reshape,
    resize,
    slice,
    split,
    squeeze,
    tile,
    top_k,
    transpose,
    unsqueeze,
)
from fcn_deploy.export.dynamic_shapes.sizes import Shape
from fcn_deploy.export.dynamic_shapes.traced_graph import State
from onnx import NodeProto


@dataclass(frozen=True)
class Operator:
    """The functions of an operator's file, as far as it has them."""

    propagate: Callable[[NodeProto, State], dict[str, Shape]] | None = None
    check: Callable[[NodeProto, State], None] | None = None
    interpret: Callable[[NodeProto, State], list[Interpretation] | None] | None = None
    assume: Callable[[NodeProto, State], tuple[str, int]] | None = None


OPERATORS: dict[str, Operator] = {
    **dict.fromkeys(along_axes.REDUCTIONS + along_axes.ORDERING, Operator(check=along_axes.check)),
    **dict.fromkeys(recurrent.OPERATORS, Operator(recurrent.propagate, recurrent.check, recurrent.interpret)),
    **dict.fromkeys(broadcasting.OPERATORS, Operator(broadcasting.propagate, interpret=broadcasting.interpret)),
    "AveragePool": Operator(check=pooling.check, interpret=pooling.interpret, assume=padding.assume),
    "BatchNormalization": Operator(check=per_channel.check),
    "Clip": Operator(interpret=size_numbers.interpret),
    "Concat": Operator(concat.propagate, interpret=concat.interpret),
    "Conv": Operator(check=per_channel.check, assume=padding.assume),
    "ConvInteger": Operator(check=per_channel.check, assume=padding.assume),
    "ConvTranspose": Operator(check=per_channel.check, interpret=conv_transpose.interpret),
    "DeformConv": Operator(check=per_channel.check),
    "Div": Operator(broadcasting.propagate, interpret=division.interpret),
    "Einsum": Operator(einsum.propagate),
    "Expand": Operator(interpret=expand.interpret),
    "Flatten": Operator(flatten.propagate),
    "Gather": Operator(check=gather.check, interpret=gather.interpret),
    "GatherElements": Operator(check=gather.check),
    "GatherND": Operator(check=gather.check),
    "Gemm": Operator(matmul.propagate),
    "GridSample": Operator(interpret=grid_sample.interpret),
    "GroupNormalization": Operator(check=per_channel.check),
    "InstanceNormalization": Operator(check=per_channel.check),
    "LayerNormalization": Operator(check=layer_normalization.check),
    "LpPool": Operator(check=pooling.check, assume=padding.assume),
    "MatMul": Operator(matmul.propagate),
    "MaxPool": Operator(check=pooling.check, interpret=pooling.interpret, assume=padding.assume),
    "MaxUnpool": Operator(interpret=resize.interpret),
    "Mul": Operator(broadcasting.propagate, interpret=division.interpret),
    "Pad": Operator(interpret=padding.interpret, assume=padding.assume),
    "QLinearConv": Operator(assume=padding.assume),
    "Reshape": Operator(check=reshape.check, interpret=reshape.interpret),
    "Resize": Operator(interpret=resize.interpret),
    "ScatterElements": Operator(check=gather.check),
    "ScatterND": Operator(check=gather.check),
    "Slice": Operator(interpret=slice.interpret),
    "Split": Operator(interpret=split.interpret),
    "Squeeze": Operator(squeeze.propagate),
    "Tile": Operator(interpret=tile.interpret),
    "TopK": Operator(check=along_axes.check, interpret=top_k.interpret),
    "Transpose": Operator(transpose.propagate),
    "Unsqueeze": Operator(unsqueeze.propagate),
}
UNKNOWN = Operator()


def operator_of(node: NodeProto) -> Operator:
    """What is known of a node's operator."""
    return OPERATORS.get(node.op_type, UNKNOWN)
