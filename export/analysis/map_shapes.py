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
LONG_PERIOD, PERIODS = 128, 16  # where a size multiple leaves so few sizes to be run
MULTIPLES = (1, 2, 3, 5, 8)  # of a size multiple of several pixels: at least these, for maps that have no remainder
LARGEST_STRIDE = 256  # pixels of a cell
LARGER = ((161, 95), (97, 190), (259, 301))  # pixels beyond the small ones; rounded up to the size multiple


class MapShapes:
    """Shapes of a network's tensors at sizes that leave every remainder along each axis.

    Attributes:
        sizes: (height, width) of the images that are run.
    """

    def __init__(self, network: ModelProto, multiple: int = 1, smallest: int = 1) -> None:
        self._network = network
        self._period = LONG_PERIOD if multiple >= LONG_PERIOD // PERIODS else PERIOD
        if multiple > 1:
            first = -(-smallest // multiple) - 1
            # A network that takes even sides may halve them five times, and resize to odd maps on its way back.
            remainders = range(1, self._period // math.gcd(self._period, multiple) + 1)
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

    def cells(self, name: str, axis: int) -> tuple[int, int] | None:
        """(stride, short) of one side of a map, of ⌈(n − short) / stride⌉ cells where the image has n pixels; or None.

        Args:
            name: of a tensor.
            axis: 2 or 3.
        """
        try:
            sides = self.sides(name, axis)
        except (ValueError, KeyError):
            return None
        pixels = [size[axis - 2] for size in self.sizes]
        if not min(sides):
            return None
        # The stride lies between those of sides that are a cell short, and a cell long.
        most, cells = max(zip(pixels, sides, strict=True))
        strides = range(max(1, most // (cells + 1)), min(most // max(cells - 1, 1) + 1, LARGEST_STRIDE) + 1)
        # Of multiples of 32 up to 256 pixels there are as many cells of 33 pixels as of 32.
        for stride in strides:
            if all(stride * side == n for n, side in zip(pixels, sides, strict=True)):
                return stride, 0
        fitting = [
            (stride, short)
            for stride in strides
            for short in range(stride if stride <= self._period else 1)
            if all(-(-(n - short) // stride) == side for n, side in zip(pixels, sides, strict=True))
        ]
        # Of 32 and 33 pixels it is 32, as strides are products of small numbers; of multiples of several pixels the
        # same sides come of several that they are short of.
        return max(fitting, key=lambda each: (each[0] & -each[0], -each[1]), default=None)

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
