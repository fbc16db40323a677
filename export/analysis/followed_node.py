"""A node that receptive fields are followed through: what it reads, and what rules ask of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fcn_deploy.export.analysis.map_sides import MapSides
from fcn_deploy.export.analysis.receptive_fields import FeatureMap, WholeImageError
from fcn_deploy.export.analysis.reshape_shapes import ReshapeShapes
from onnx import NodeProto


@dataclass(frozen=True)
class FollowedNode:
    """A node, the feature maps it reads, and what else is needed to follow them through it.

    Attributes:
        proto: the node.
        attributes: of it.
        maps: that it reads, in the order of its inputs.
        constants: of the network, by name.
        opset: of the network.
        shapes: of its Reshapes.
        sides: of its feature maps, where they are read as numbers.
        unit: (height, width) in pixels, or in cells of what a part of a network starts from, for which `maps` have
            whole numbers of cells.
    """

    proto: NodeProto
    attributes: dict[str, Any]
    maps: list[FeatureMap]
    constants: Mapping[str, np.ndarray]
    opset: int
    shapes: ReshapeShapes
    sides: MapSides
    unit: tuple[int, int]

    @property
    def operator(self) -> str:
        return self.proto.op_type

    @property
    def name(self) -> str:
        return named(self.proto)

    def has_input(self, place: int) -> bool:
        return len(self.proto.input) > place and bool(self.proto.input[place])

    def constant(self, place: int) -> np.ndarray | None:
        """A constant input; None where it is left out or computed."""
        return self.constants.get(self.proto.input[place]) if self.has_input(place) else None

    def numbers(self, attribute: str, place: int) -> list[int] | None:
        """Whole numbers, an attribute or in later opsets an input; None where they are left out or computed."""
        given = self.attributes.get(attribute)
        if given is None:
            given = self.constant(place)
        return None if given is None else [int(number) for number in np.ravel(given)]

    def single_map(self, layout: tuple[str, ...] | None = None) -> FeatureMap:
        """The one feature map it reads, its first input; of that layout, where one is asked for."""
        if len(self.maps) > 1 or self.proto.input[0] in self.constants:
            raise WholeImageError(f"{self.name} takes two feature maps, or one in another's place")
        if layout is not None and self.maps[0].layout != layout:
            raise WholeImageError(f"{self.name} takes a feature map that is laid out as {self.maps[0].layout}")
        return self.maps[0]

    def joined_maps(self) -> FeatureMap:
        """All feature maps it reads, place by place."""
        first = self.maps[0]
        for other in self.maps[1:]:
            if other.layout != first.layout:
                raise WholeImageError(f"{self.name} joins feature maps laid out as {first.layout} and {other.layout}")
            for ours, theirs in zip(first.fields, other.fields, strict=True):
                if ours.stride != theirs.stride:
                    strides = f"{ours.stride} and {theirs.stride}"
                    raise WholeImageError(f"{self.name} joins feature maps of strides {strides}")
            (rows, columns), (other_rows, other_columns) = first.fields, other.fields
            first = FeatureMap((rows.joined(other_rows), columns.joined(other_columns)), first.layout)
        return first

    def works_over_channels(self, axes: Sequence[int] | None, layout: tuple[str, ...]) -> None:
        """Refuse what works along other axes than channels."""
        if axes is None or any(layout[axis] != "C" for axis in axes):
            along = None if axes is None else [layout[axis] for axis in axes]
            raise WholeImageError(f"{self.name} works along {along}, not over channels")


def named(node: NodeProto) -> str:
    """A node as reasons name it."""
    return f"{node.op_type} {node.name or node.output[0]}"
