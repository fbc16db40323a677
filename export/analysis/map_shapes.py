"""The shapes of feature maps at many image sizes, by running the network at small ones."""

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import onnx
from fcn_deploy.export.analysis.accepted_sizes import run_quietly
from fcn_deploy.export.graph.edit import dims, extract
from fcn_deploy.runtime.backends.onnxruntime import session
from onnx import ModelProto

Shape = tuple[int, ...]
PERIOD = 64  # pixels after which what is left of a map by whole steps repeats, at the usual strides
MULTIPLES = (1, 2, 3, 5, 8)  # of a size multiple of several pixels: at least these, for maps that have no remainder
LARGER = ((161, 95), (97, 190), (259, 301))  # pixels beyond the small ones; rounded up to the size multiple


class MapShapes:
    """Shapes of a network's tensors at sizes that leave every remainder along each axis.

    Attributes:
        sizes: (height, width) of the images that are run.
    """

    def __init__(self, network: ModelProto, multiple: int = 1, smallest: int = 1) -> None:
        self._network = network
        if multiple > 1:
            first = -(-smallest // multiple) - 1
            # A network that takes even sides may halve them five times, and resize to odd maps on its way back.
            remainders = range(1, PERIOD // math.gcd(PERIOD, multiple) + 1)
            sides = [(first + times) * multiple for times in sorted({*MULTIPLES, *remainders})]
            self.sizes = list(zip(sides, (*sides[1:], *sides[:1]), strict=True))
        else:
            sides = [smallest + more for more in range(PERIOD)]
            # Another remainder along the other axis, so that no two dimensions are always equal.
            self.sizes = [(side, sides[(7 * index + 3) % PERIOD]) for index, side in enumerate(sides)]
        if multiple < PERIOD // 2:
            least = -(-smallest // multiple) * multiple
            self.sizes += [
                (least + -(-rows // multiple) * multiple, least + -(-columns // multiple) * multiple)
                for rows, columns in LARGER
            ]

    @cached_property
    def _names(self) -> list[str]:
        image = self._network.graph.input[0].name
        return [image, *(name for node in self._network.graph.node for name in node.output if name)]

    @cached_property
    def _known(self) -> dict[str, list[Shape]]:
        image = self._network.graph.input[0]
        run = session(extract(self._network, self._names[1:]).SerializeToString(), optimise=False)
        tensor = image.type.tensor_type
        channels, dtype = tensor.shape.dim[1].dim_value, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        known: dict[str, list[Shape]] = {name: [] for name in self._names}
        for size in self.sizes:
            pixels = np.zeros((1, channels, *size), dtype)
            for name, result in zip(self._names, (pixels, *run_quietly(run, pixels)), strict=True):
                known[name].append(np.shape(result))
        return known

    def of(self, name: str) -> Sequence[Shape]:
        """The shapes of a tensor, one for each of `sizes`. Raises what ONNX Runtime does where a size fails."""
        return self._known[name]

    def sides(self, name: str, axis: int) -> list[int]:
        """One side of a map [N, C, H, W] at each of `sizes`; axis: 2 or 3. Raises ValueError where it has others."""
        if any(len(shape) != 4 for shape in self.of(name)):
            raise ValueError(f"{name} is no map [N, C, H, W]")
        return [shape[axis] for shape in self.of(name)]

    def equal_to(self, name: str, before: str) -> str | None:
        """The latest map before a tensor whose height and width are those of `name` at every size; None: there is none.

        Args:
            name: of a map.
            before: of a tensor, which the map that is looked for does not need.
        """
        wanted = [shape[2:] for shape in self.of(name)]
        for other in reversed(self._names[: self._names.index(before)]):
            shapes = self.of(other)
            if all(len(shape) == 4 for shape in shapes) and [shape[2:] for shape in shapes] == wanted:
                return other
        return None


def score_stride(network: ModelProto, multiple: int = 1, smallest: int = 1) -> int:
    """Pixels from one of a network's scores [N, K, h, w] to the next, where that is one number; else 1.

    Args:
        network: float32 [N,C,H,W] → scores.
        multiple: H and W are multiples of it.
        smallest: and so large at least.
    """
    unit = math.lcm(PERIOD, multiple)
    side = -(-max(smallest, 2 * unit) // unit) * unit
    run, channels = session(network.SerializeToString(), optimise=False), dims(network.graph.input[0])[1]
    image = np.zeros([1, int(channels or 1), side, side + unit], np.float32)
    rows, columns = run_quietly(run, image)[0].shape[2:]
    strides = (side / rows, (side + unit) / columns) if rows and columns else (0.0, 0.0)
    return int(strides[0]) if strides[0] == strides[1] == int(strides[0]) else 1
