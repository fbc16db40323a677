"""The places that a core can be cut at, and the networks between them.

Where several feature maps cross, as skip connections do, they are packed into one of the deepest's stride, whose cells
hold all that lies in them (SpaceToDepth), and unpacked behind the cut: every stage takes one map and gives one, and
values are only moved.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from fcn_deploy.export.analysis.crossings import crossings
from fcn_deploy.export.graph.edit import Names, needed_nodes
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

CANDIDATES = 16  # places that are looked at: the fewest bytes that cross in each part of the work
CROSSING_TYPES = (np.float32, np.uint8, np.int8)
Operator = tuple[str, dict[str, Any]]  # and its attributes


@dataclass(frozen=True)
class Place:
    """A place to cut at.

    Attributes:
        position: how many of the core's nodes are before it.
        maps: that cross, and the stride of each in pixels.
        name: of the map that crosses, or that all are packed into.
        stride: in pixels, of that map.
    """

    position: int
    maps: tuple[tuple[str, int], ...]
    name: str
    stride: int

    @property
    def packed(self) -> bool:
        return len(self.maps) > 1


class CuttingPlaces:
    """Of a core.

    Args:
        core: `image` → `scores`, float32 or with Q/DQ.
        card: of the model.
        tensors: every tensor of the core for a square image of zeros, by name; those of packing are added.
        work: of a node, in any unit.
        packed: whether places where several maps cross are candidates.

    Attributes:
        candidates: worth a try, in the order of the nodes.
    """

    def __init__(
        self,
        core: ModelProto,
        card: ModelCard,
        tensors: dict[str, npt.NDArray[np.generic]],
        work: Callable[[NodeProto], float],
        packed: bool = True,
    ) -> None:
        self._core, self._tensors, self._names = core, tensors, Names(core)
        self._side = tensors[core.graph.input[0].name].shape[2]
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        found = crossings(core, sizes)
        self._nodes = [crossing.node for crossing in found]
        of_image = {name for node in self._nodes for name in node.output}
        self._constant_nodes = [node for node in core.graph.node if of_image.isdisjoint(node.output)]
        # Between an operator and its Q or DQ, which libraries run as one.
        self._within_int8 = {name for node in self._nodes if node.op_type == "QuantizeLinear" for name in node.input}
        self._within_int8 |= {
            name for node in self._nodes if node.op_type == "DequantizeLinear" for name in node.output
        }
        done = np.cumsum([float(work(node)) for node in self._nodes])
        done /= max(1.0, done[-1])
        least: dict[int, tuple[int, Place]] = {}
        for position, crossing in enumerate(found[:-1], 1):
            if len(crossing.maps) > 1 and not packed:
                continue
            part = int(done[position - 1] * CANDIDATES)
            crossing_bytes = sum(sizes[name] for name in crossing.maps)
            if part in least and least[part][0] <= crossing_bytes:
                continue
            if (place := self._place(position, crossing.maps, card)) is not None:
                least[part] = crossing_bytes, place
        self.candidates = tuple(place for _, place in least.values())

    def network(self, start: Place | None, stop: Place | None) -> ModelProto:
        """The core's part between two places; None: from the image, to the scores."""
        core, unpacking, packing = self._core.graph, self._unpacking(start), self._packing(stop)
        inner = self._nodes[start.position if start else 0 : stop.position if stop else None]
        inputs = core.input if start is None else [self._value(start)]
        outputs = core.output if stop is None else [self._value(stop)]
        nodes, needed = needed_nodes([*self._constant_nodes, *unpacking, *inner, *packing], outputs)
        weights = [tensor for tensor in (*core.initializer, *self._channels(start)) if tensor.name in needed]
        graph = helper.make_graph(nodes, core.name, inputs, outputs, weights)
        model = helper.make_model(graph, ir_version=self._core.ir_version, opset_imports=self._core.opset_import)
        model.functions.extend(self._core.functions)
        return model

    def _place(self, position: int, names: Sequence[str], card: ModelCard) -> Place | None:
        """Where these maps cross; None where they cannot be one."""
        tensors = [self._tensors[name] for name in names]
        if self._within_int8 & set(names) or any(t.ndim != 4 or t.dtype not in CROSSING_TYPES for t in tensors):
            return None
        strides = [self._stride(name) for name in names]
        deepest = max(strides)
        if any(not stride or deepest % stride for stride in strides):
            return None
        maps = tuple(zip(names, strides, strict=True))
        if len(maps) == 1:
            return Place(position, maps, names[0], deepest)
        if card.size_multiple % deepest:  # not all sizes have whole cells of it
            return None
        place = Place(position, maps, self._names(f"features/{position}"), deepest)
        kinds = {tensor.dtype for tensor in tensors}
        for (name, stride), tensor in zip(maps, tensors, strict=True):
            block = deepest // stride
            shape = (1, tensor.shape[1] * block**2, self._side // deepest, self._side // deepest)
            for step in ("blocks", "numbers"):
                for end in ("packed", "unpacked"):
                    dtype = tensor.dtype if step == "blocks" or len(kinds) == 1 else np.float32
                    self._tensors[self._step(place, name, f"{end}/{step}")] = np.zeros(shape, dtype)
        parts = [self._tensors[self._step(place, name, "packed/numbers")] for name in names]
        self._tensors[place.name] = np.concatenate(parts, axis=1)
        return place

    def _stride(self, name: str) -> int:
        """Pixels of a cell of a map; 0 where that is no whole number, or not the same down and across."""
        height, width = self._tensors[name].shape[2:]
        return self._side // height if height == width and height and self._side % height == 0 else 0

    def _value(self, place: Place) -> ValueInfoProto:
        tensor = self._tensors[place.name]
        kind = helper.np_dtype_to_tensor_dtype(tensor.dtype)
        return helper.make_tensor_value_info(place.name, kind, ["N", tensor.shape[1], "h", "w"])

    def _step(self, place: Place, name: str, step: str) -> str:
        """The name of a map on the way into the packed one, or out of it."""
        return self._names(f"{place.name}/{name}/{step}")

    def _packing(self, place: Place | None) -> list[NodeProto]:
        if place is None or not place.packed:
            return []
        nodes, parts = self._ways(place, back=False)
        return [*nodes, helper.make_node("Concat", parts, [place.name], place.name, axis=1)]

    def _unpacking(self, place: Place | None) -> list[NodeProto]:
        if place is None or not place.packed:
            return []
        nodes, parts = self._ways(place, back=True)
        channels = self._names(f"{place.name}/channels")
        return [helper.make_node("Split", [place.name, channels], parts, channels, axis=1), *reversed(nodes)]

    def _channels(self, place: Place | None) -> list[TensorProto]:
        """Of the maps that are packed: the constant that they are unpacked by."""
        if place is None or not place.packed:
            return []
        counts = [self._tensors[name].shape[1] * (place.stride // stride) ** 2 for name, stride in place.maps]
        return [numpy_helper.from_array(np.array(counts, np.int64), self._names(f"{place.name}/channels"))]

    def _ways(self, place: Place, back: bool) -> tuple[list[NodeProto], list[str]]:
        """Nodes from each map to its part of the packed one, or back, in the order of packing; names of the parts."""
        nodes, parts = [], []
        for name, stride in place.maps:
            last = name
            for step, *operators in self._steps(name, place.stride // stride, self._tensors[place.name].dtype):
                operator, attributes = operators[back]
                after = self._step(place, name, f"{'unpacked' if back else 'packed'}/{step}")
                source, result = (after, last) if back else (last, after)
                nodes.append(helper.make_node(operator, [source], [result], after, **attributes))
                last = after
            parts.append(last)
        return nodes, parts

    def _steps(self, name: str, block: int, packed: np.dtype[Any]) -> Iterator[tuple[str, Operator, Operator]]:
        """What a map goes through to be packed, and what undoes it: operators and their attributes."""
        if block > 1:
            yield "blocks", ("SpaceToDepth", {"blocksize": block}), ("DepthToSpace", {"blocksize": block})
        if (dtype := self._tensors[name].dtype) != packed:  # of 8 bits, beside floats: whole numbers, which are exact
            kinds = (helper.np_dtype_to_tensor_dtype(each) for each in (packed, dtype))
            there, undone = (("Cast", {"to": kind}) for kind in kinds)
            yield "numbers", there, undone
