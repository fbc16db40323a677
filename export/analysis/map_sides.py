"""Which side of which feature map a computed number is, as ends of crops are."""

from collections.abc import Mapping

import numpy as np
from fcn_deploy.export.analysis.receptive_fields import FeatureMap
from fcn_deploy.export.graph.edit import attributes
from fcn_deploy.export.graph.evaluate import evaluate
from onnx import ModelProto, NodeProto

# They hand numbers on as they are.
PICKING = ("Cast", "Concat", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
FIRST = 1 << 40  # sides stand for themselves from here on, which no constant of a graph is near
RANK = 16


class MapSides:
    """The sides of feature maps, followed from Shape nodes through what picks and joins them."""

    def __init__(self, model: ModelProto, constants: Mapping[str, np.ndarray]) -> None:
        self._model, self._constants = model, constants
        self._maps: list[FeatureMap] = []
        self._values: dict[str, np.ndarray] = {}

    def follow(self, node: NodeProto, maps: Mapping[str, FeatureMap]) -> None:
        """Look at a node that gives no feature map."""
        if node.op_type == "Shape":
            if (found := maps.get(node.input[0])) is not None:
                sides = FIRST + RANK * len(self._maps) + np.arange(found.rank, dtype=np.int64)
                ends = attributes(node)
                self._values[node.output[0]] = sides[slice(ends.get("start", 0), ends.get("end", None))]
                self._maps.append(found)
            return
        read = [name for name in node.input if name]
        if node.op_type not in PICKING or self._values.keys().isdisjoint(read):
            return
        known = {name: self._values.get(name, self._constants.get(name)) for name in read}
        values = {name: value for name, value in known.items() if value is not None}
        if len(values) == len(known):
            made = evaluate(self._model, node, values)
            self._values |= {name: np.asarray(value) for name, value in zip(node.output, made, strict=False)}

    def of(self, name: str) -> list[tuple[FeatureMap, int]] | None:
        """(the map, the axis) of each number of a tensor; None where one of them is something else."""
        values = self._values.get(name)
        if values is None or values.dtype != np.int64:
            return None
        numbers = values.reshape(-1) - FIRST
        if len(numbers) == 0 or numbers.min() < 0:
            return None
        return [(self._maps[int(number) // RANK], int(number) % RANK) for number in numbers]
