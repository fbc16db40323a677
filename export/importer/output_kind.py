"""What an output is beside scores of classes, by evidence: prototypes, query masks, distances, flows, embeddings.

Such maps have one value per pixel and channel, as scores have, and an argmax over them labels nothing.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from fcn_deploy.export.analysis.model_end import last_activation
from fcn_deploy.export.graph.edit import attributes, metadata
from fcn_deploy.export.graph.index import GraphIndex
from fcn_deploy.export.importer.score_map import find_map_axes
from fcn_deploy.runtime.errors import DeployError
from onnx import ModelProto, NodeProto

# Words in an output's name, and what they name.
NAMED = {
    "proto": "mask prototypes", "prototype": "mask prototypes", "prototypes": "mask prototypes",
    "protos": "mask prototypes", "dist": "distances", "distance": "distances", "distances": "distances",
    "flow": "flows", "flows": "flows", "hv": "gradients of distances", "vector": "vectors", "vectors": "vectors",
    "offset": "offsets", "offsets": "offsets", "embed": "embeddings", "embedding": "embeddings",
    "embeddings": "embeddings", "depth": "depths", "disparity": "disparities", "normal": "normals",
    "normals": "normals", "box": "boxes", "boxes": "boxes", "bbox": "boxes", "keypoints": "key points",
    "fgr": "colours", "rgb": "colours", "albedo": "colours", "recon": "images", "reconstruction": "images",
}  # fmt: skip
# Words in the name of another output, what several maps beside it may be, and how many these are at most: SAM's masks
# have an IoU each, and Cellpose's flows and probability of a cell come with a vector of the image's style.
BESIDE = {
    "iou": ("masks of one object or classes", 4), "style": ("flows with a probability or classes", 3),
    "styles": ("flows with a probability or classes", 3),
}  # fmt: skip
# Of NAMED, what the last layer's weights are hardly called by chance.
OF_LAYERS = frozenset(NAMED) - {"vector", "vectors", "depth", "normal", "normals", "box", "boxes"}
AFTER_LAYERS = (
    "Identity", "Transpose", "Resize", "Upsample", "Cast", "Tanh", "Relu", "Slice", "Add", "BatchNormalization",
)  # fmt: skip
BESIDE_IMAGE = frozenset(("Identity", "Transpose", "Cast", "Clip", "Relu", "Pad", "Slice"))
ARITHMETIC = frozenset(("Add", "Sub", "Mul", "Div"))
INSTANCES = ("segment", "detect", "pose", "obb")  # tasks that exporters write into metadata
COEFFICIENTS = 5  # of a detection beside those of its mask: a box and a class at least
LENGTH_1 = 1e-3  # of a squared length, as far as float16 and an epsilon leave it
MANY = 4  # maps beside one that ends in a Sigmoid

Shapes = Mapping[str, Sequence[int | str | None]]


@dataclass(frozen=True)
class OutputKind:
    """What an output was taken for.

    Attributes:
        what: it is, in words: `mask prototypes`.
        why: the evidence.
        asked: whether that is a question to the user, as it may be scores all the same.
        alone: whether it is one map.
    """

    what: str
    why: str
    asked: bool = False
    alone: bool = False


def kind_of_output(
    model: ModelProto,
    name: str,
    result: np.ndarray,
    size: tuple[int, int],
    others: Shapes,
    called: str | None = None,
    shares: Collection[str] = (),
) -> OutputKind | None:
    """What an output that follows the image is, where it is no scores of classes; None: nothing speaks against it.

    Args:
        model: of the output, as its file has it.
        name: of the output.
        result: it, for one image.
        size: (height, width) of that image.
        others: names and shapes of the model's other outputs, as far as they are known.
        called: what the output is called where the model comes from; None: as here.
        shares: others that are known to be between 0 and 1.
    """
    axes = find_map_axes(result.shape, size)
    if axes is None or result.dtype.kind != "f":
        return None
    count = result.size // (len(result) * result.shape[axes.rows] * result.shape[axes.columns])
    task, names = metadata(model, "task"), metadata(model, "names")
    if task in INSTANCES and names is not None and _named(names) not in (0, count) and others:
        return OutputKind("mask prototypes", f"the file says task={task}, with {_named(names)} classes")
    for other, shape in others.items():
        if found := _beside(count, axes.factor, shape, size):
            return OutputKind(found, f"beside {other} {list(shape)}")
    for other in others:
        what, most = next((BESIDE[word] for word in _words(other) if word in BESIDE), ("", 0))
        if 1 < count <= most:
            return OutputKind(what, f"beside {other}", asked=True)
    words = [word for word in _words(name if called is None else called) if word in NAMED]
    if words:
        return OutputKind(NAMED[words[0]], "by its name", alone=count == 1)
    index = GraphIndex(model)
    if count > 1 and (kind := _of_last_nodes(index, name, count)) is not None:
        return kind
    if count > 1 and (node := _unit_length(index, name)) is not None:
        return OutputKind("embeddings", f"node {node.name or node.output[0]} brings them to length 1")
    if count > 1 and _of_length_1(result, (axes.rows, axes.columns)):
        return OutputKind("embeddings or normals", "all are of length 1")
    if count >= MANY and last_activation(index, name) is None:
        return _beside_a_share(index, others, axes.factor, size, shares)
    return None


def _beside_a_share(
    index: GraphIndex, others: Shapes, factor: int, size: tuple[int, int], shares: Collection[str]
) -> OutputKind | None:
    """Distances, perhaps, beside one map of as many places that is between 0 and 1."""
    for other, shape in others.items():
        alike = find_map_axes([side if isinstance(side, int) else 0 for side in shape], size)
        one = alike is not None and alike.factor == factor and _channels(shape, alike) == 1
        end = last_activation(index, other) if one else None
        if one and (other in shares or (end is not None and end.op_type == "Sigmoid")):
            return OutputKind("distances or classes", f"beside {other}, which ends in a Sigmoid", asked=True)
    return None


def refusal_of(kind: OutputKind, name: str, output: str, shape: Sequence[int]) -> DeployError:
    """What is said of a model `name` one of whose outputs is no scores of classes, or may be none."""
    if kind.asked:
        return DeployError(
            f"{name}: whether the maps of {output} {list(shape)} are {kind.what} cannot be told ({kind.why}); say "
            "--activation softmax or none (values), or name another --output"
        )
    scores = (
        "--activation sigmoid takes its map for a score"
        if kind.alone
        else "--activation softmax takes them for classes"
    )
    return DeployError(
        f"{name}: {output} {list(shape)} holds {kind.what}, no scores of classes ({kind.why}); "
        f"--activation none gives them as values, {scores} all the same"
    )


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z]+", name.lower())


def _of_last_nodes(index: GraphIndex, name: str, count: int) -> OutputKind | None:
    """Images, of as many channels as what is given, or what the last layer is named after."""
    sides = [side.dim_value for side in index.model.graph.input[0].type.tensor_type.shape.dim]
    # Scores are masked by one channel of an image, such as its alpha.
    if count in sides[1:] and (node := _with_the_image(index, name)) is not None:
        return OutputKind("images", f"node {node.name or node.output[0]} makes them of the image itself")
    if layer := _layer_of_values(index, name):
        word = next(word for word in _words(layer) if word in OF_LAYERS)
        return OutputKind(f"{NAMED[word]} or classes", f"its last layer is {layer}", asked=True)
    return None


def _with_the_image(index: GraphIndex, name: str) -> NodeProto | None:
    """The node that adds the image itself to an output last, or masks it by that, as denoising and matting do."""
    node = _after_constants(index, name)
    if node is None or node.op_type not in ARITHMETIC:
        return None
    ends = [_after_constants(index, read) for read in node.input]
    pure = [end is None and index.constant(read) is None for end, read in zip(ends, node.input, strict=True)]
    return node if any(pure) else None


def _after_constants(index: GraphIndex, name: str) -> NodeProto | None:
    """The last node before a tensor, but for moves and arithmetic with constants; None: the image is before it."""
    while (node := index.producer(name)) is not None:
        changing = [read for read in node.input if read and index.constant(read) is None]
        if len(changing) != 1 or node.op_type not in BESIDE_IMAGE | ARITHMETIC:
            return node
        name = changing[0]
    return None


def _layer_of_values(index: GraphIndex, name: str) -> str:
    """The weights of the last layer, where their name is one of values, such as `flow_head.weight`; ""."""
    node = index.before(name, AFTER_LAYERS)
    if node is None or node.op_type not in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
        return ""
    return next((name for name in (*node.input[1:2], node.name) if OF_LAYERS & set(_words(name))), "")


def _channels(shape: Sequence[int | str | None], axes) -> int:
    sides = [side for place, side in enumerate(shape[1:], 1) if place not in (axes.rows, axes.columns)]
    return sides[0] if len(sides) == 1 and isinstance(sides[0], int) else 1


def _named(names: str) -> int:
    """How many classes a dictionary or list of names in an exporter's metadata has; 0: it cannot be told."""
    return len(re.findall(r"""['"][^'"]*['"]""", names)) if names.strip()[:1] in "{[" else 0


def _beside(count: int, factor: int, shape: Sequence[int | str | None], size: tuple[int, int]) -> str:
    """What `count` maps at 1/factor of the image are beside an output of this shape: of instances; "": nothing."""
    if len(shape) != 3:
        return ""
    sides = [side for side in shape[1:] if isinstance(side, int)]
    area = [-(-size[0] // by) * -(-size[1] // by) for by in (1, 2, 4, 8)]
    if find_map_axes([side if isinstance(side, int) else 0 for side in shape], size) or (set(sides) & set(area[:3])):
        return ""  # a map, or scores that were flattened
    if shape[1] == count and len(sides) == 2 and count > 1 and shape[2] not in area:
        return "masks of queries"
    if factor > 1 and count >= MANY and any(count + COEFFICIENTS <= side <= count + 4096 for side in sides):
        return "mask prototypes"
    return ""


def _of_length_1(result: np.ndarray, places: tuple[int, int]) -> bool:
    """Whether the vectors at all places are of length 1, and do not choose one class each."""
    if np.isin(result, (0, 1)).all():
        return False
    channels = tuple(axis for axis in range(1, result.ndim) if axis not in places)
    lengths = np.square(result.astype(np.float64)).sum(axis=channels)
    return bool(np.abs(lengths - 1).max() <= LENGTH_1)


def _unit_length(index: GraphIndex, name: str) -> NodeProto | None:
    """The node that brings an output's vectors to length 1 over the channels; None where none does."""
    node = index.before(name, ("Identity", "Transpose", "Resize", "Cast"))
    if node is None:
        return None
    if node.op_type == "LpNormalization":
        return node if attributes(node).get("axis", -1) in (1, -3, -1, 3) else None
    if node.op_type != "Div":
        return None
    length = index.before(node.input[1], ("Identity", "Expand", "Clip", "Max", "Add", "Sqrt"))
    of = length is not None and length.op_type in ("ReduceL2", "ReduceSumSquare") and length.input[0] == node.input[0]
    return node if of else None
