"""A network without the Resize that brings its image to a multiple, so that what is left can be run in tiles.

`resize_to_multiple` is what puts that Resize there; the runtime does it for each tile instead.
"""

import math
from dataclasses import dataclass

import numpy as np
from fcn_deploy.export.analysis.accepted_sizes import run_quietly
from fcn_deploy.export.graph.edit import attributes, dims, extract, set_shape
from fcn_deploy.export.graph.index import GraphIndex
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.engine_format.pooled import nearest_multiple
from onnx import ModelProto, NodeProto, ValueInfoProto

# Of images that are resized to see to what: each beside another, near and far from multiples of usual strides.
SIDES = (1, 2, 5, 13, 16, 24, 31, 33, 48, 65, 95, 129, 160, 191, 257, 300, 383, 385, 511, 640, 769)


@dataclass(frozen=True)
class Unresized:
    """What a network is without it.

    Attributes:
        model: of the resized image, float32 [N,C,H,W], H and W multiples of `multiple` → scores.
        multiple: the image was resized to the nearest one of it, halves up.
        least: pixels a side that it was resized to at least.
    """

    model: ModelProto
    multiple: int
    least: int


def without_resizing(core: ModelProto) -> Unresized | None:
    """The network that its resized image is given to; None: it does not begin by resizing to a multiple."""
    index = GraphIndex(core)
    image = core.graph.input[0]
    readers = [node for node in core.graph.node if image.name in node.input and node.op_type != "Shape"]
    if len(readers) != 1 or not _is_bilinear(index, readers[0]):
        return None
    result = readers[0].output[0]
    found = _resizes_to(core, result)
    if found is None:
        return None
    resized = ValueInfoProto(name=result)
    set_shape(resized, ["N", dims(image)[1] or 1, "H", "W"])
    model = extract(core, [value.name for value in core.graph.output], [resized])
    if any(image.name in node.input for node in model.graph.node):
        return None  # it reads the size of the image elsewhere
    model.graph.output[0].CopyFrom(core.graph.output[0])
    return Unresized(model, *found)


def _is_bilinear(index: GraphIndex, node: NodeProto) -> bool:
    given = attributes(node)
    return (
        node.op_type == "Resize"
        and node.input[0] == index.image
        and given.get("mode") == "linear"
        and given.get("coordinate_transformation_mode", "half_pixel") == "half_pixel"
        and not given.get("antialias")
        and given.get("keep_aspect_ratio_policy", "stretch") == "stretch"
    )


def _resizes_to(core: ModelProto, result: str) -> tuple[int, int] | None:
    """(multiple, least side) of what images are resized to; None: something else."""
    run = session(extract(core, [result]).SerializeToString(), optimise=False)
    channels = int(dims(core.graph.input[0])[1] or 1)
    pairs: list[tuple[int, int]] = []  # a side, and what it is resized to
    for sides in zip(SIDES, (*SIDES[7:], *SIDES[:7]), strict=True):
        try:
            (resized,) = run_quietly(run, np.zeros((1, channels, *sides), np.float32))
        except Exception:  # of ONNX Runtime, as of a side that is rounded down to 0
            return None
        pairs += zip(sides, resized.shape[2:], strict=True)
    wanted = [each for _, each in pairs]
    multiple, least = math.gcd(*wanted), min(wanted)
    holds = all(nearest_multiple(side, multiple, least) == each for side, each in pairs)
    return (multiple, least) if holds and multiple > 1 and len(set(wanted)) > 1 else None
