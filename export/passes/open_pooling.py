"""A network whose pooled values are inputs, so that it can be run in tiles: for runtime.tiling.pooled.

What takes means over the whole of a map (global and adaptive average pooling, instance normalisation) is cut off, and
its results become inputs. Every Resize that goes to the size of another map, or has aligned corners, reads where the
size of the image says; it becomes a `Stretch`, an operator of ours with which receptive fields are computed, and which
`lowered` turns into standard ones that are told by inputs where to read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from fcn_deploy.export.analysis.followed_node import named
from fcn_deploy.export.analysis.map_shapes import MapShapes
from fcn_deploy.export.analysis.receptive_field_rules import REDUCTIONS
from fcn_deploy.export.analysis.receptive_fields import STRETCH, TILES_DOMAIN
from fcn_deploy.export.graph.edit import Names, add_constants, attributes, clone, prune
from fcn_deploy.export.graph.index import GraphIndex, has_input
from fcn_deploy.runtime.engine_format.pooled import Interpolation, Statistic
from fcn_deploy.runtime.engine_format.stage import COORDINATES, ROUNDINGS, Upsampling
from onnx import ModelProto, NodeProto, TensorProto, helper

UNIFORM = Upsampling("nearest", "asymmetric", rounding="floor")  # how one cell is spread over a map


class NotPooledError(Exception):
    """The network is not of this kind; the text says why."""


@dataclass(frozen=True)
class OpenedModel:
    """A network whose pooled values are inputs after its first, the image.

    Attributes:
        model: with Stretch nodes.
        statistics: pooled values, in the order of the nodes; each is the name of an input.
        maps: name of a statistic → the map that it is of.
        shapes: of the network's maps.
    """

    model: ModelProto
    statistics: tuple[Statistic, ...]
    maps: dict[str, str]
    shapes: MapShapes


def open_pooling(core: ModelProto, multiple: int = 1, smallest: int = 1) -> OpenedModel | None:
    """The network with its pooled values as inputs; None: it pools nothing over the whole image.

    Args:
        core: float32 [N,C,H,W] → scores.
        multiple: H and W are multiples of it.
        smallest: and so large at least.

    Raises:
        NotPooledError: in a way that is not known.
    """
    return _Opening(core, MapShapes(core, multiple, smallest)).opened()


class _Opening:
    def __init__(self, core: ModelProto, shapes: MapShapes) -> None:
        self.core, self.shapes, self.index, self.names = core, shapes, GraphIndex(core), Names(core)
        self.local = {core.graph.input[0].name}  # what has places of the image
        self.of_values: set[str] = set()  # what is computed of pooled values, and has none
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.statistics: list[Statistic] = []
        self.maps: dict[str, str] = {}

    def opened(self) -> OpenedModel | None:
        for node in self.core.graph.node:
            self._take(node)
        if not self.statistics:
            return None
        model = clone(self.core)
        del model.graph.node[:]
        model.graph.node.extend(self.nodes)
        add_constants(model, self.constants)
        for each in self.statistics:
            shape = [1, *self._value_shape(each)]
            model.graph.input.append(helper.make_tensor_value_info(each.name, TensorProto.FLOAT, shape))
        model.opset_import.append(helper.make_opsetid(TILES_DOMAIN, 1))
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in set(self.maps.values()))
        prune(model)
        del model.graph.output[1:]
        return OpenedModel(model, tuple(self.statistics), self.maps, self.shapes)

    def _value_shape(self, each: Statistic) -> list[int]:
        return [self.shapes.of(self.maps[each.name])[0][1], *each.cells]

    def _take(self, node: NodeProto) -> None:
        """One node, as it is or otherwise."""
        reads = {name for name in node.input if name}
        if node.op_type in ("Shape", "Size"):
            self.of_values |= set(node.output) if not self.of_values.isdisjoint(reads) else set()
            self.nodes.append(node)
        elif not self.local.isdisjoint(reads):
            self._take_local(node)
        elif not self.of_values.isdisjoint(reads):
            if node.op_type in ("Resize", "Upsample", "Expand") and self._cells(node.output[0]) is not None:
                self._stretch(node)
                return
            self.of_values |= set(node.output)
            self.nodes.append(node)
        else:
            self.nodes.append(node)

    def _take_local(self, node: NodeProto) -> None:
        if (found := self._pooled(node)) is not None:
            self._cut(node, *found)
            return
        if node.output[0] in self.local:
            return  # the Reshape after a normalisation of groups, which was made with it
        if node.op_type == "InstanceNormalization" and node.input[0] in self.local:
            self._normalise(node)
        elif node.op_type in ("Resize", "Upsample") and self._reads_by_size(node):
            self._stretch(node)
        else:
            self.nodes.append(node)
        self.local |= {name for name in node.output if name}

    # Pooling

    def _pooled(self, node: NodeProto) -> tuple[str, tuple[int, int]] | None:
        """(the map that a node takes means of, the cells of the grid of means); None: it takes none."""
        if node.op_type == "GlobalAveragePool":
            return node.input[0], (1, 1)
        if node.op_type == "ReduceMean" and node.op_type in REDUCTIONS:
            axes = attributes(node).get("axes")
            if axes is None and has_input(node, 1):
                axes = self.index.constant(node.input[1])
            rank = len(self.shapes.of(node.input[0])[0])
            whole = axes is not None and sorted(int(axis) % 4 for axis in axes) == [2, 3]
            return (node.input[0], (1, 1)) if whole and rank == 4 else None
        if node.op_type != "MatMul" or node.input[0] not in self.local or node.input[1] in self.local:
            return None
        first = self.index.producer(node.input[0])
        if first is None or first.op_type != "MatMul" or first.input[1] not in self.local:
            return None
        shapes = {shape[1:] for shape in self.shapes.of(node.output[0])}
        if len(shapes) != 1 or len(shape := shapes.pop()) != 3 or first.input[0] in self.local:
            return None
        return first.input[1], (shape[1], shape[2])

    def _cut(self, node: NodeProto, of: str, cells: tuple[int, int]) -> None:
        """Make what a node gives an input; of another rank than the map, it is brought to that."""
        result, rank = node.output[0], len(self.shapes.of(node.output[0])[0])
        name = result if rank == 4 else self.names(f"{result}/pooled")
        self._input(Statistic(name, cells=cells), of)
        if rank != 4:
            axes = self._constant(f"{result}/axes", np.array([2, 3], np.int64))
            self.nodes.append(helper.make_node("Squeeze", [name, axes], [result], name=f"{result}/squeezed"))
            self.of_values.add(result)

    def _normalise(self, node: NodeProto) -> None:
        """Instance normalisation, or that of groups in its form, by a mean and a variance that are given."""
        x, y, epsilon = node.input[0], node.output[0], attributes(node).get("epsilon", 1e-5)
        groups = 0
        if (apart := self._grouped(node)) is not None:
            x, y, groups = apart
        mean, variance = (self.names(f"{y}/{what}") for what in ("mean", "variance"))
        self._input(Statistic(mean), x)
        self._input(Statistic(variance, "variance"), x)
        scale, bias = (self.index.constant(name) for name in node.input[1:3])
        if scale is None or bias is None:
            raise NotPooledError(f"{named(node)} has a scale that is computed")
        channels = self.shapes.of(x)[0][1]
        scale, bias = (each.repeat(channels // each.size) for each in (scale, bias))
        if groups:
            mean, variance = self._of_groups(y, mean, variance, channels, groups)
        steps = (
            ("Sub", [x, mean], "centred"),
            ("Add", [variance, self._constant(f"{y}/epsilon", np.array(epsilon, np.float32))], "steadied"),
            ("Sqrt", [f"{y}/steadied"], "deviation"),
            ("Div", [self._constant(f"{y}/scale", scale.reshape(1, -1, 1, 1)), f"{y}/deviation"], "factor"),
            ("Mul", [f"{y}/centred", f"{y}/factor"], "scaled"),
        )
        for operator, inputs, what in steps:
            self.nodes.append(helper.make_node(operator, inputs, [f"{y}/{what}"], name=f"{y}/{what}"))
        shift = self._constant(f"{y}/bias", bias.reshape(1, -1, 1, 1))
        self.nodes.append(helper.make_node("Add", [f"{y}/scaled", shift], [y], name=f"{y}/normalised"))
        self.local.add(y)

    def _grouped(self, node: NodeProto) -> tuple[str, str, int] | None:
        """(map, normalised map, groups) of an instance normalisation of a map [N, C, h, w] as [N, groups, rest]."""
        before, after = self.index.producer(node.input[0]), self.index.consumers(node.output[0])
        if before is None or len(after) != 1 or {before.op_type, after[0].op_type} != {"Reshape"}:
            return None
        x, y, shapes = before.input[0], after[0].output[0], self.shapes.of(node.input[0])
        groups = {shape[1] for shape in shapes}
        plain = all(len(shape) == 3 for shape in shapes) and len(groups) == 1 and x in self.local
        return (x, y, groups.pop()) if plain and self.shapes.of(x) == self.shapes.of(y) else None

    def _of_groups(self, y: str, mean: str, variance: str, channels: int, groups: int) -> tuple[str, str]:
        """The mean and the variance of each channel's group, by channel, of those of the channels."""
        each = channels // groups
        weight = self._constant(f"{y}/group", np.full((channels, each, 1, 1), 1 / each, np.float32))
        steps: tuple[tuple[str, list[str], str, dict[str, Any]], ...] = (
            ("Conv", [mean, weight], f"{y}/group_mean", {"group": groups}),
            ("Sub", [mean, f"{y}/group_mean"], f"{y}/apart", {}),
            ("Mul", [f"{y}/apart", f"{y}/apart"], f"{y}/apart_squared", {}),
            ("Add", [variance, f"{y}/apart_squared"], f"{y}/spread", {}),
            ("Conv", [f"{y}/spread", weight], f"{y}/group_variance", {"group": groups}),
        )
        for operator, inputs, result, settings in steps:
            self.nodes.append(helper.make_node(operator, inputs, [result], name=result, **settings))
            self.of_values.add(result)
        return f"{y}/group_mean", f"{y}/group_variance"

    def _input(self, statistic: Statistic, of: str) -> None:
        if of == self.core.graph.input[0].name:
            raise NotPooledError("the image itself is pooled")  # there is no network before it to run
        if self._cells(of) is None:
            raise NotPooledError(f"{of} is pooled, which is {self._no_map(of)}")
        self.statistics.append(statistic)
        self.maps[statistic.name] = of
        self.of_values.add(statistic.name)

    def _no_map(self, name: str) -> str:
        """What a tensor is of which tiles give no part, in words."""
        size = max(self.shapes.sizes)
        shape = self.shapes.of(name)[self.shapes.sizes.index(size)]
        if len(shape) != 4:
            return f"[{', '.join(map(str, shape))}] of an image of {size[0]}×{size[1]}, and no map"
        cells = f"{shape[2]}×{shape[3]} of {size[0]}×{size[1]}"
        return f"{cells}: no map whose sides are the image's over a whole number, rounded"

    def _constant(self, wanted: str, value: np.ndarray) -> str:
        name = self.names(wanted)
        self.constants[name] = np.asarray(value)
        return name

    # Stretching

    def _reads_by_size(self, node: NodeProto) -> bool:
        """Whether a Resize reads at places that change with the size of the image."""
        given = attributes(node)
        if node.op_type == "Upsample":
            return False
        computed = has_input(node, 3) and self.index.constant(node.input[3]) is None
        return computed or given.get("coordinate_transformation_mode") == "align_corners"

    def _stretch(self, node: NodeProto) -> None:
        """A Resize or Expand as a Stretch."""
        x, y = node.input[0], node.output[0]
        how, to = self._how(node), self._cells(y)
        source, cells = self._cells(x) if x in self.local else None, (0, 0)
        if source is None:
            shapes = {shape[2:] for shape in self.shapes.of(x)}
            if x in self.local or len(shapes) != 1 or len(shape := shapes.pop()) != 2:
                raise NotPooledError(self._what_makes_a_grid(x) or f"{named(node)} resizes what is {self._no_map(x)}")
            cells = (shape[0], shape[1])
        if to is None or self.shapes.of(x)[0][1] != self.shapes.of(y)[0][1]:
            raise NotPooledError(f"{named(node)} goes to what is {self._no_map(y)}")
        if cells == (1, 1):
            how = UNIFORM
        settings: dict[str, Any] = {
            "mode": how.mode, "coordinates": how.coordinates, "rounding": how.rounding,
            "stride": [stride for stride, _ in to], "short": [short for _, short in to],
            "source": [stride for stride, _ in source or ()] or (0, 0),
            "source_short": [short for _, short in source or ()] or (0, 0), "cells": cells,
        }  # fmt: skip
        self.nodes.append(helper.make_node(STRETCH, [x], [y], name=node.name, domain=TILES_DOMAIN, **settings))
        self.local.add(y)

    def _what_makes_a_grid(self, x: str) -> str:
        """The first operator before `x` that makes a grid of one size of a map, by other means than averages; ""."""
        before = set(self.index.ancestors(x))
        for node in self.core.graph.node:
            if node.output[0] in before & self.local and len(set(self.shapes.of(node.output[0]))) == 1:
                return f"{named(node)} makes a grid of the whole image, and is no average"
        return ""

    def _how(self, node: NodeProto) -> Upsampling:
        if node.op_type == "Expand":
            return UNIFORM
        given = attributes(node)
        mode, coordinates = given.get("mode", "nearest"), given.get("coordinate_transformation_mode", "half_pixel")
        rounding = given.get("nearest_mode", "round_prefer_floor")
        plain = not given.get("antialias") and given.get("keep_aspect_ratio_policy", "stretch") == "stretch"
        if mode not in ("linear", "nearest") or coordinates not in COORDINATES or not plain:
            raise NotPooledError(f"{named(node)} resizes by {mode}, {coordinates}")
        return Upsampling(mode, coordinates, rounding=rounding if rounding in ROUNDINGS else "round_prefer_floor")

    def _cells(self, name: str) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """(stride, short) of a map's height and of its width, as of MapShapes.cells; None: it is no such map."""
        rows, columns = (self.shapes.cells(name, axis) for axis in (2, 3))
        return None if rows is None or columns is None else (rows, columns)


def lowered(opened: ModelProto) -> tuple[ModelProto, tuple[Interpolation, ...]]:
    """A network with Stretch nodes, or a part of one, in standard operators; and the inputs that say where they read.

    Inputs that nothing reads are left out, but for the first.
    """
    model = clone(opened)
    nodes: list[NodeProto] = []
    found: dict[str, Interpolation] = {}
    for node in opened.graph.node:
        if node.domain != TILES_DOMAIN:
            nodes.append(node)
            continue
        given, x = attributes(node), node.input[0]
        how = Upsampling(given["mode"], given["coordinates"], rounding=given["rounding"])
        both = ("stride", "source", "cells", "short", "source_short")
        for_axes = [Interpolation("", axis, how, *(given[what][axis] for what in both)) for axis in (0, 1)]
        places = [e for e in for_axes if e.cells or (e.source, e.source_short) != (e.stride, e.short)]
        for place in places:
            name = "/".join(map(str, ("places", place.axis, how.mode, how.coordinates, how.rounding, place.stride)))
            name += f"-{place.short}/{'cells' if place.cells else 'from'}/{place.cells or place.source}"
            name += f"-{place.source_short}"
            found[name] = replace(place, name=name)
            y = node.output[0] if place is places[-1] else f"{node.output[0]}/rows"
            nodes += _interpolated(name, how, x, y, 2 + place.axis)
            x = y
        if not places:
            nodes.append(helper.make_node("Identity", [x], [node.output[0]], name=node.name))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for each in found.values():
        # One name for what is of one length: ONNX Runtime takes equal names for equal sizes.
        side = each.name
        model.graph.input.append(helper.make_tensor_value_info(f"{each.name}/first", TensorProto.INT64, [side]))
        if each.how.mode == "linear":
            model.graph.input.append(helper.make_tensor_value_info(f"{each.name}/second", TensorProto.INT64, [side]))
            shape: list[str | int | None] = [side, 1] if each.axis == 0 else [1, side]
            model.graph.input.append(helper.make_tensor_value_info(f"{each.name}/weight", TensorProto.FLOAT, shape))
    for entry in [entry for entry in model.opset_import if entry.domain == TILES_DOMAIN]:
        model.opset_import.remove(entry)
    read = {name for node in model.graph.node for name in node.input}
    kept = [value for place, value in enumerate(model.graph.input) if place == 0 or value.name in read]
    kept = [clone(value) for value in kept]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return model, tuple(found.values())


def _interpolated(name: str, how: Upsampling, x: str, y: str, axis: int) -> Sequence[NodeProto]:
    """Nodes that read along one axis where the inputs say."""
    make = helper.make_node
    if how.mode == "nearest":
        return [make("Gather", [x, f"{name}/first"], [y], axis=axis, name=y)]
    return [
        make("Gather", [x, f"{name}/first"], [f"{y}/first"], axis=axis, name=f"{y}/first"),
        make("Gather", [x, f"{name}/second"], [f"{y}/second"], axis=axis, name=f"{y}/second"),
        make("Sub", [f"{y}/second", f"{y}/first"], [f"{y}/step"], name=f"{y}/step"),
        make("Mul", [f"{y}/step", f"{name}/weight"], [f"{y}/part"], name=f"{y}/part"),
        make("Add", [f"{y}/first", f"{y}/part"], [y], name=y),
    ]
