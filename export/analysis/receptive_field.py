"""The receptive field of a network, computed on its graph: what of an image a score depends on.

Each axis is followed by itself, from the image to the scores. Cell i of a tensor depends on the pixels from
stride·i + low to stride·i + high (Araujo, Norris, Sim, "Computing Receptive Fields of Convolutional Neural Networks",
2019, in exact fractions, and with upsampling: the widest of its phases).
"""

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from fcn_deploy.export.analysis.branches import first_branching
from fcn_deploy.export.analysis.followed_node import FollowedNode, named
from fcn_deploy.export.analysis.map_sides import MapSides
from fcn_deploy.export.analysis.receptive_field_rules import GLOBAL, REDUCTIONS, RULES, spread_grid
from fcn_deploy.export.analysis.receptive_fields import (
    NCHW,
    OF_IMAGE,
    STRETCH,
    TILES_DOMAIN,
    FeatureMap,
    Fields,
    WholeImageError,
)
from fcn_deploy.export.analysis.reshape_shapes import ReshapeShapes
from fcn_deploy.export.graph.edit import attributes, initializers, opset
from fcn_deploy.export.graph.index import GraphIndex, constant_of
from onnx import ModelProto, NodeProto

# What operators do with maps of odd sizes, by numbers that are computed from them.
BY_SIZE = {
    "Resize": "stretches odd sizes to another map's; export-onnx --fit pad avoids that",
    "Pad": "pads odd sizes to another map's; export-onnx --fit pad avoids that",
}


@dataclass(frozen=True)
class ReceptiveField:
    """Of a network's scores, vertical and horizontal.

    Attributes:
        fields: of the scores.
        halo: pixels around a tile that its scores depend on, at most, as a multiple of `period`.
        period: in pixels: a tile that begins at a multiple of it gives the scores of the whole image.
    """

    fields: Fields

    @property
    def period(self) -> int:
        return math.lcm(*(field.period for field in self.fields))

    @property
    def halo(self) -> tuple[int, int]:
        reaches = (max(-field.low, field.high - field.stride + 1, 0) for field in self.fields)
        rows, columns = (math.ceil(reach / self.period) * self.period for reach in reaches)
        return rows, columns


def receptive_field(
    core: ModelProto, start: Fields = OF_IMAGE, known: Mapping[str, np.ndarray] | None = None
) -> ReceptiveField:
    """The receptive field of a network's result.

    Args:
        core: the network, or a part of one. Inputs after its first are values that are the same all over an image.
        start: of its input, vertical and horizontal; what is given stands for the image itself.
        known: initialisers that were read already.

    Raises:
        WholeImageError: it cannot be had; names the operator.
    """
    try:
        return _followed(core, start, initializers(core, known))
    except WholeImageError as error:
        # Of several reasons the one that is plain.
        raise WholeImageError(global_operator(core) or str(error)) from error


def global_operator(model: ModelProto) -> str:
    """The first operator that is sure to look at the whole image, as pooling over all of it and attention do; "": none.

    That a network has none does not tell that it looks at a neighbourhood: receptive_field does.
    """
    index = GraphIndex(model)
    of_image = {index.image}  # what is computed of the image's values, not of its size
    for node in model.graph.node:
        if node.op_type == "If":  # whose branches may be others at other sizes
            return named(node)
        if node.op_type in ("Shape", "Size") or of_image.isdisjoint(node.input):
            continue
        of_image.update(node.output)
        several = sum(name in of_image for name in node.input) > 1
        if node.op_type in GLOBAL or (node.op_type == "MatMul" and several):
            return named(node)
        if node.op_type == "Einsum" and several and _sums_places(node):
            return named(node)
        if node.op_type in REDUCTIONS and _reduces_places(index, node):
            return named(node)
    return ""


def _sums_places(node: NodeProto) -> bool:
    """Whether an Einsum sums over another axis than the channels of maps [N, C, H, W]."""
    given, _, result = attributes(node)["equation"].replace(" ", "").partition("->")
    maps = [labels for labels in given.split(",") if len(labels) == 4]
    return bool(set(given) - set(result) - {","} - {labels[1] for labels in maps})


def _reduces_places(index: GraphIndex, node: NodeProto) -> bool:
    """Whether a reduction is over H and W, or over what is not known."""
    axes = attributes(node).get("axes")
    if axes is None and len(node.input) > 1:
        axes = index.constant(node.input[1])
    return axes is None or {int(axis) % 4 for axis in axes} >= {2, 3}


def _followed(core: ModelProto, start: Fields, constants: dict[str, np.ndarray]) -> ReceptiveField:
    """As receptive_field, with the first reason that is met."""
    shapes, version = ReshapeShapes(core, start), opset(core)
    maps, sides = {core.graph.input[0].name: FeatureMap(start)}, MapSides(core, constants)
    values = {value.name for value in core.graph.input[1:]} - constants.keys()  # and what is computed of them alone
    if (chooses := first_branching(core)) is not None:
        raise WholeImageError(named(chooses))
    for node in core.graph.node:
        if _is_constant(node, constants):
            continue
        read = [maps[name] for name in node.input if name in maps]
        if not read and not values.isdisjoint(node.input):
            if node.op_type == STRETCH:
                maps[node.output[0]] = spread_grid(attributes(node))
            elif all(name in values or name in constants for name in node.input if name):
                values |= set(node.output)
            continue
        if not read or node.op_type in ("Shape", "Size"):
            sides.follow(node, maps)
            continue  # arithmetic on shapes, say: it matters where a feature map meets it
        rule = RULES.get(node.op_type)
        if rule is None or node.domain not in ("", "ai.onnx", TILES_DOMAIN):
            raise WholeImageError(named(node))
        unknown = _in_none(node.input, maps, constants, values)
        if unknown and node.op_type not in ("Reshape", "Flatten", "Slice"):
            if node.op_type in BY_SIZE:
                raise WholeImageError(f"{named(node)} {BY_SIZE[node.op_type]}")
            raise WholeImageError(f"{named(node)} takes {unknown[0]}, which is computed from the image's size")
        rows, columns = (max(1, read[0].period // field.stride) for field in start)
        result = rule(FollowedNode(node, attributes(node), read, constants, version, shapes, sides, (rows, columns)))
        # Second results are indices of places, or the same map.
        outputs = node.output[:1] if node.op_type in ("MaxPool", "TopK") else node.output
        maps |= dict.fromkeys((name for name in outputs if name), result)
    scores = core.graph.output[0].name
    if scores not in maps:
        raise WholeImageError(f"{scores} does not depend on the image by operators that are known")
    if maps[scores].layout != NCHW:
        raise WholeImageError(f"{scores} is not laid out as [N,K,H,W]")
    return ReceptiveField(maps[scores].fields)


def _in_none(names: Iterable[str], *known: Container[str]) -> list[str]:
    """The names that nothing known has; asked one by one, as a union would be made for each node."""
    return [name for name in names if name and not any(name in each for each in known)]


def _is_constant(node: NodeProto, constants: dict[str, np.ndarray]) -> bool:
    """Whether a node gives a constant, which is then among `constants`."""
    if node.op_type == "Constant":
        constants[node.output[0]] = np.asarray(constant_of(node))
        return True
    if node.op_type == "DequantizeLinear" and node.input[0] in constants:
        constants[node.output[0]] = constants[node.input[0]]  # weights; their shape is what matters
        return True
    return False
