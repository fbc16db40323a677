"""What OpenVINO computes otherwise than ONNX Runtime, as the graph tells: there it is left out, or refused.

Each shows at some sizes or places only, so that a comparison at build time need not meet it.
"""

from collections.abc import Callable, Container
from dataclasses import dataclass, replace

import numpy as np
from fcn_deploy.export.analysis.branches import first_branching
from fcn_deploy.export.analysis.model_end import AS_PYTORCH
from fcn_deploy.export.build.config import BuildConfig
from fcn_deploy.export.graph.edit import attributes, initializers, label
from fcn_deploy.export.graph.index import GraphIndex
from fcn_deploy.export.quantization.options import Say
from fcn_deploy.runtime.errors import DeployError
from onnx import ModelProto, NodeProto, TensorProto, shape_inference


@dataclass(frozen=True)
class Difference:
    """A node that OpenVINO computes otherwise.

    Attributes:
        node: which.
        asks: for what, as a verb and its object.
        openvino: what OpenVINO does.
        instead: another remedy than ONNX Runtime, or "".
    """

    node: NodeProto
    asks: str
    openvino: str
    instead: str = ""


def without_openvino_where_it_differs(core: ModelProto, config: BuildConfig, say: Say) -> BuildConfig:
    """The config without OpenVINO where it would compute a node of the core otherwise, which is said.

    Raises:
        DeployError: there is one, and nothing but OpenVINO may run it.
    """
    tuning = config.tuning
    if not config.on_cpu or tuning is None or "openvino" not in tuning.backends:
        return config
    found = next((difference for find in _DIFFERENCES if (difference := find(core)) is not None), None)
    if found is None:
        return config
    what, low = f"node {label(found.node)} {found.asks}", config.quantization.precision == "bf16"
    if low or tuning.backends == ("openvino",):
        remedy = "omit --bf16" if low else "use --backend onnxruntime"
        instead = f", or {found.instead}" if found.instead else ""
        raise DeployError(f"{what}, which OpenVINO {found.openvino}; {remedy}{instead}")
    say(f"{what}: OpenVINO, which {found.openvino}, is left out")
    backends = tuple(backend for backend in tuning.backends if backend != "openvino")
    return replace(config, tuning=replace(tuning, backends=backends))


def keeps_aspect_ratio(core: ModelProto) -> Difference | None:
    """A Resize that keeps the aspect ratio."""
    policies = ((node, attributes(node).get("keep_aspect_ratio_policy", "stretch")) for node in _resizes(core))
    kept = next((node for node, policy in policies if policy != "stretch"), None)
    asks, instead = "keeps the aspect ratio (keep_aspect_ratio_policy)", "take it out and resize images before"
    return Difference(kept, asks, "stretches", instead) if kept is not None else None


def _other_length(core: ModelProto) -> Difference | None:
    """A Resize by a scale such as 1.3.

    floor(90 × 1.3) is 116 in float32, as ONNX Runtime has it, and 117 in OpenVINO. What is a multiple of 1/256 has one
    product in either.
    """
    held = initializers(core)
    for node in _resizes(core):
        scales = held.get(node.input[2]) if len(node.input) > 2 else None
        if scales is not None and np.any(scales * 256 % 1):
            asks = f"resizes by {max(scales, key=lambda scale: scale * 256 % 1):g}"
            return Difference(node, asks, "gives another length at some sizes", "give the Resize sizes instead")
    return None


def _weights_of_its_own(core: ModelProto) -> Difference | None:
    """A Resize that is antialiased, or a cubic one that leaves out what is beyond the border."""
    for node in _resizes(core):
        given = attributes(node)
        if given.get("antialias"):
            return Difference(node, "is antialiased", "does not do")
        if given.get("mode") == "cubic" and given.get("exclude_outside"):
            return Difference(node, "leaves out what is beyond the border (exclude_outside)", "does not do")
    return None


def _nearest_cells(core: ModelProto) -> Difference | None:
    """Nearest neighbours that tie, computed as PyTorch does: OpenVINO's quotients are not always the nearest ones."""
    computed = (node for node in core.graph.node if node.op_type == "Range" and f"/{AS_PYTORCH}/" in node.output[0])
    if (found := next(computed, None)) is None:
        return None
    asks = "finds nearest neighbours that tie, from map to map by no whole factor"
    return Difference(
        found, asks, "takes from other cells at some sizes", "interpolate bilinearly or by a whole factor"
    )


def _branches(core: ModelProto) -> Difference | None:
    """A branch that the image's size decides: scores of both libraries are compared at a few sizes."""
    chooses = first_branching(core)
    asks, openvino = "chooses a branch by the image's size", "is not known to do at every size"
    return Difference(chooses, asks, openvino) if chooses is not None else None


INTEGERS = (TensorProto.INT32, TensorProto.INT64, TensorProto.UINT32, TensorProto.UINT64)
# Of whole numbers from 2^24 on OpenVINO is wrong in these, and right in sums, products and the like of two.
IN_FLOAT = frozenset(
    ("Div", "Mod", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "ReduceMax", "ReduceMin")
)
COUNTS = frozenset(("ReduceSum", "ReduceMean"))


def _large_integers(core: ModelProto) -> Difference | None:
    """Arithmetic on numbers of pixels or places, which are 2^24 and more in an image of 17 megapixels."""
    asked = [node for node in core.graph.node if node.op_type in IN_FLOAT | COUNTS]
    if not asked:
        return None
    typed, index = shape_inference.infer_shapes(core).graph, GraphIndex(core)
    types = {value.name: value.type.tensor_type.elem_type for value in (*typed.input, *typed.value_info)}
    whole = {name for name, kind in types.items() if kind in INTEGERS}
    for node in asked:
        if node.input[0] in whole and _may_be_large(node.input[0], index, whole, node.op_type in COUNTS):
            asks = f"computes with numbers of places by {node.op_type}, which may be 2^24 and more"
            return Difference(node, asks, "does in float32")
    return None


def _may_be_large(name: str, index: GraphIndex, whole: Container[str], summed: bool) -> bool:
    """Whether whole numbers may be as large as a map has places, as products of two sides, or places by number, are.

    Args:
        whole: the names of what holds whole numbers.
        summed: they are summed over places, so that small ones make large ones.
    """
    open_, seen = [name], set[str]()
    while open_:
        name = open_.pop()
        node = index.producer(name)
        if name in seen or node is None or node.op_type == "Shape":
            continue
        seen.add(name)
        computed = [read for read in node.input if read and index.constant(read) is None]
        product = node.op_type == "Mul" and len(computed) == 2
        if product or node.op_type in ("Size", "ReduceProd", "NonZero", "CumSum"):
            return True
        if summed and any(read not in whole for read in computed):
            return True
        open_ += [read for read in computed if read in whole]
    return False


def _resizes(core: ModelProto) -> list[NodeProto]:
    return [node for node in core.graph.node if node.op_type == "Resize"]


_DIFFERENCES: tuple[Callable[[ModelProto], Difference | None], ...] = (
    keeps_aspect_ratio,
    _other_length,
    _weights_of_its_own,
    _nearest_cells,
    _branches,
    _large_integers,
)
