"""The shapes before and after the Reshapes of a network at two image sizes, by running it."""

from functools import cached_property

import numpy as np
import onnx
from fcn_deploy.export.analysis.accepted_sizes import run_quietly
from fcn_deploy.export.graph.edit import extract
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.errors import one_line
from onnx import ModelProto, NodeProto

Shape = tuple[int, ...]
BeforeAndAfter = tuple[Shape, Shape]
# Sides in units: primes, so that no two dimensions that belong to the size are equal.
SIDES = ((17, 23), (29, 19))
# What a unit is, in multiples of the period: blocks may want more than the period.
UNITS = (1, 2, 4, 8, 3, 7)


class ReshapeShapes:
    """The shapes of every Reshape and Flatten of a network, each found when it is asked for.

    All are had of one run for a size, where the network runs at that size as a whole.
    """

    def __init__(self, network: ModelProto) -> None:
        self._network = network
        self._known: dict[tuple[int, int], dict[str, Shape]] = {}  # size of the image → tensor → its shape
        self._partial: set[tuple[int, int]] = set()  # sizes at which the network does not run as a whole

    @cached_property
    def _wanted(self) -> list[str]:
        reshapes = (node for node in self._network.graph.node if node.op_type in ("Reshape", "Flatten"))
        return list(dict.fromkeys(name for node in reshapes for name in (node.input[0], node.output[0])))

    @cached_property
    def _session(self):
        return session(extract(self._network, self._wanted).SerializeToString(), optimise=False)

    def at_two_sizes(self, node: NodeProto, unit: tuple[int, int]) -> tuple[BeforeAndAfter, BeforeAndAfter]:
        """Of one node, for images whose sides are multiples of `unit`, (height, width).

        Raises:
            ValueError: it runs at none; says why.
        """
        reason = ""
        for times in UNITS:
            sizes = [(unit[0] * rows * times, unit[1] * columns * times) for rows, columns in SIDES]
            try:
                first, second = (self._at(node, size, together=times == 1) for size in sizes)
                return first, second
            except Exception as error:  # of ONNX Runtime, whose errors share no base class
                reason = reason or one_line(error)
        raise ValueError(reason)

    def _at(self, node: NodeProto, size: tuple[int, int], together: bool) -> BeforeAndAfter:
        known, names = self._known.setdefault(size, {}), [node.input[0], node.output[0]]
        if not all(name in known for name in names):
            # Those before are known already, or of no interest any more.
            wanted = self._wanted[self._wanted.index(names[0]) :] if together and size not in self._partial else names
            try:
                known |= self._run(wanted, size)
            except Exception:
                self._partial.add(size)
                if wanted == names:
                    raise
                known |= self._run(names, size)
        return known[names[0]], known[names[1]]

    def _run(self, names: list[str], size: tuple[int, int]) -> dict[str, Shape]:
        image = self._network.graph.input[0].type.tensor_type
        channels, dtype = image.shape.dim[1].dim_value, onnx.helper.tensor_dtype_to_np_dtype(image.elem_type)
        results = run_quietly(self._session, np.zeros((1, channels, *size), dtype), names, in_part=True)
        return {name: result.shape for name, result in zip(names, results, strict=True)}
