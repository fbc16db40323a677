"""Whether a network looks at all of a larger image: its inner maps follow the size, and the outermost pixels count.

A network that pads or crops every image to the size it was traced at runs at all sizes, and gives scores that have the
image's size; nothing but these two tells.
"""

from collections.abc import Callable

import numpy as np
import onnx
from fcn_deploy.export.analysis.accepted_sizes import run_quietly
from fcn_deploy.export.graph.edit import Names, attributes, clone, label, prune
from fcn_deploy.export.graph.index import GraphIndex, has_input
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.errors import DeployError
from onnx import ModelProto, NodeProto, helper

# Pairs of sizes, of which the first that a network takes are run.
PROBED = (((32, 48), (48, 32)), ((64, 96), (96, 64)), ((192, 320), (320, 192)), ((256, 512), (512, 256)))
UNIT = 32  # of sides that nearly all networks take
EDGE = 8  # of the sides: so much is overwritten, at least a few pixels
LARGEST_PROBE = 1 << 21  # pixels of an image that is run for this alone

Run = Callable[[np.ndarray], np.ndarray]


def padded_to_one_size(model: ModelProto, channels: int) -> tuple[NodeProto, tuple[int, int]] | None:
    """The first Pad that brings maps of every size to one, and that (height, width); None: none is seen.

    Args:
        model: float32 [N,C,H,W] → scores, which is run at two sizes where it pads by amounts that it computes.
        channels: C.
    """
    index = GraphIndex(model)
    pads = [node for node in model.graph.node if node.op_type == "Pad" and has_input(node, 1)]
    pads = [node for node in pads if index.constant(node.input[1]) is None]
    if not pads:
        return None
    probed, names = clone(model), Names(model)
    del probed.graph.output[:]
    for node in pads:
        for place, value in enumerate((node.input[0], node.output[0])):
            shape = names(f"{node.output[0]}/shape_{place}")
            probed.graph.node.append(helper.make_node("Shape", [value], [shape], name=shape))
            probed.graph.output.append(onnx.ValueInfoProto(name=shape))
            probed.graph.output[-1].type.tensor_type.elem_type = onnx.TensorProto.INT64
    prune(probed)
    run = session(probed.SerializeToString())

    def shapes_at(size: tuple[int, int]) -> list[np.ndarray]:
        return run_quietly(run, np.zeros((1, channels, *size), np.float32))

    for pair in PROBED:
        try:
            first, second = (shapes_at(size) for size in pair)
        except Exception:  # a size that it does not take
            continue
        for place, node in enumerate(pads):
            before, after = ([found[2 * place + side] for found in (first, second)] for side in (0, 1))
            moved = [axis for axis in range(len(before[0])) if before[0][axis] != before[1][axis]]
            if moved and len(before[0]) == 4 and all(after[0][axis] == after[1][axis] for axis in moved):
                more = _padded_by(shapes_at, _larger(pair[0], before[0], after[0]), place, after[0])
                if more is None or (more == 0 and _is_all_padding(index, node)) or more < 0:
                    return node, (int(after[0][2]), int(after[0][3]))
        return None
    return None


def _larger(size: tuple[int, int], before: np.ndarray, after: np.ndarray) -> tuple[int, int]:
    """A size of an image at which a map that comes to `after` at `size`, of `before`, is larger than that by itself."""
    rows, columns = (UNIT * (int(after[axis]) * size[axis - 2] // (int(before[axis]) * UNIT) + 2) for axis in (2, 3))
    return rows, columns


def _padded_by(
    shapes_at: Callable[[tuple[int, int]], list[np.ndarray]], size: tuple[int, int], place: int, once: np.ndarray
) -> int | None:
    """By how much a Pad fills maps that are larger than what others come to: more than 0 fills up to a multiple, 0 is
    for small maps alone, less crops; None: it cannot be had.
    """
    if size[0] * size[1] > LARGEST_PROBE:
        return None
    try:
        found = shapes_at(size)
    except Exception:  # a size that it does not take
        return None
    before, after = found[2 * place], found[2 * place + 1]
    more = [int(after[axis] - before[axis]) for axis in (2, 3) if before[axis] > once[axis]]
    return max(more, key=abs) if more else None


def _is_all_padding(index: GraphIndex, pad: NodeProto) -> bool:
    """Whether a Pad is all the padding of the windows that read it, as "same" padding is."""
    readers = index.consumers(pad.output[0])
    given = [attributes(node) for node in readers]
    return bool(readers) and all(
        node.op_type in ("Conv", "MaxPool", "AveragePool") and not any(each.get("pads", ()))
        for node, each in zip(readers, given, strict=True)
    )


def refuse_unseen_edges(run: Run, image: np.ndarray, name: str) -> None:
    """Raise DeployError where the outermost rows and columns of an image change no score, and others do.

    Args:
        run: images float32 [N,C,H,W] → scores.
        image: of noise, larger than what the network was traced at.
        name: of the network, for errors.
    """
    height, width = image.shape[2:]
    if height * width > LARGEST_PROBE:
        return
    high, wide = max(height // EDGE, 1), max(width // EDGE, 1)
    scores = run(image)
    before, behind, middle = image.copy(), image.copy(), image.copy()
    before[:, :, :high] = before[:, :, :, :wide] = 3
    behind[:, :, height - high :] = behind[:, :, :, width - wide :] = 3
    middle[:, :, height // 2 - high : height // 2 + high, width // 2 - wide : width // 2 + wide] = 3
    counts = [not np.array_equal(run(changed), scores) for changed in (before, behind, middle)]
    for each, what in zip(counts, ("first", "last"), strict=False):
        if not each and any(counts):
            raise DeployError(
                f"{name} does not look at all of an image of {height}×{width}: its {what} {high} rows and {wide} "
                "columns change no score, so that a size is baked in; export it again with dynamic axes for H and W"
            )


def padding_refusal(node: NodeProto, size: tuple[int, int], name: str) -> DeployError:
    """The error of a network that brings every image to one size."""
    return DeployError(
        f"{name}: node {label(node)} pads or crops every image to {size[0]}×{size[1]}: a size is baked in as a number "
        "less the image's size; export it again with dynamic axes for H and W"
    )
