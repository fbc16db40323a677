"""Networks that take every size, with sizes baked into some of their nodes, freed again: is one ever silently wrong?

Each network is made of blocks whose shapes are computed. Numbers of one size are written into nodes that are drawn by
chance: targets of Reshape, Resize, Expand and Slice, amounts of Pad (also as a number less the size), windows of
pooling. What import_model makes of it is compared with the network before, at sizes that neither was traced at:

    python -m benchmarks.mutated_graphs --count 1000
"""

import argparse
import collections
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from fcn_deploy.export.importer.import_model import ImportedModel, import_model
from fcn_deploy.runtime.errors import DeployError
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

CHANNELS, CLASSES = 8, 4
TRACED = ((64, 96), (64, 64), (96, 64), (48, 80), (128, 64), (80, 112))
OTHERS = ((96, 160), (128, 64), (32, 48), (160, 96), (72, 56), (101, 67))
TOLERANCE = 1e-4  # of the range of the scores
BAKED_INPUTS = {"Reshape": (1,), "Resize": (3,), "Expand": (1,), "Slice": (1, 2), "Pad": (1,)}
SAID = "are taken for"  # of a guess that a note names


@dataclass
class Mutant:
    """A network, and the same with sizes baked in.

    Attributes:
        seed: it was drawn by.
        free: takes every size, or multiples of what its strides are.
        baked: the same at the traced size.
        blocks: that it is made of.
        nodes: whose numbers were baked.
        traced: (height, width).
    """

    seed: int
    free: ModelProto
    baked: ModelProto
    blocks: list[str]
    nodes: list[str]
    traced: tuple[int, int]


@dataclass
class _Maker:
    """Nodes and weights of a network that is being made."""

    random: np.random.Generator
    nodes: list[NodeProto] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)

    def node(self, kind: str, *inputs: str, **settings) -> str:
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **settings))
        return name

    def number(self, *values: int) -> str:
        return self.weight(np.array(values, np.int64))

    def weight(self, array: np.ndarray) -> str:
        name = f"w_{len(self.weights)}"
        self.weights[name] = array
        return name

    def conv(
        self, x: str, into: int = CHANNELS, out: int = CHANNELS, side: int = 3, stride: int = 1, pad: int = 1
    ) -> str:
        scale = 1.4 / np.sqrt(into * side * side)
        weight = self.weight((self.random.standard_normal((out, into, side, side)) * scale).astype(np.float32))
        bias = self.weight(self.random.standard_normal(out).astype(np.float32) * np.float32(0.1))
        return self.node("Conv", x, weight, bias, strides=[stride] * 2, pads=[pad] * 4, kernel_shape=[side] * 2)

    def side(self, x: str, axis: int) -> str:
        return self.node("Gather", self.node("Shape", x), self.number(axis), axis=0)

    def list(self, *parts: str) -> str:
        return self.node("Concat", *parts, axis=0)

    def shape(self, x: str) -> tuple[str, str, str, str]:
        n, h, w = (self.side(x, axis) for axis in (0, 2, 3))
        return n, self.number(CHANNELS), h, w

    def resize(self, x: str, like: str, mode: str = "linear") -> str:
        return self.node("Resize", x, "", "", self.list(*self.shape(like)), mode=mode)


def _flattened(m: _Maker, y: str) -> str:
    n, c, h, w = m.shape(y)
    flat = m.node("Reshape", y, m.list(n, c, m.node("Mul", h, w)))
    mean = m.node("ReduceMean", flat, m.number(2), keepdims=1)
    return m.node("Reshape", m.node("Sub", flat, mean), m.list(n, c, h, w))


def _shuffled(m: _Maker, y: str) -> str:
    n, c, h, w = m.shape(y)
    apart = m.node("Reshape", y, m.list(n, m.number(2), m.number(CHANNELS // 2), h, w))
    turned = m.node("Transpose", apart, perm=[0, 2, 1, 3, 4])
    return m.conv(m.node("Reshape", turned, m.list(n, c, h, w)))


def _attention(m: _Maker, y: str) -> str:
    n, c, h, w = m.shape(y)
    keys = m.node("Reshape", m.conv(y, side=1, pad=0), m.list(n, c, m.node("Mul", h, w)))
    queries = m.node("Transpose", keys, perm=[0, 2, 1])
    weights = m.node("Softmax", m.node("MatMul", queries, keys), axis=-1)
    mixed = m.node("Transpose", m.node("MatMul", weights, queries), perm=[0, 2, 1])
    return m.node("Add", y, m.node("Reshape", mixed, m.list(n, c, h, w)))


def _pixel_shuffle(m: _Maker, y: str) -> str:
    n, c, h, w = m.shape(y)
    wide = m.conv(y, out=4 * CHANNELS, stride=2)
    low, across = (m.side(wide, axis) for axis in (2, 3))
    two = m.number(2)
    parts = m.node("Reshape", wide, m.list(n, c, two, two, low, across))
    turned = m.node("Transpose", parts, perm=[0, 1, 4, 2, 5, 3])
    full = m.node("Reshape", turned, m.list(n, c, m.node("Mul", low, two), m.node("Mul", across, two)))
    return m.node("Slice", full, m.number(0, 0), m.list(h, w), m.number(2, 3))


def _down_and_up(m: _Maker, y: str) -> str:
    return m.node("Add", y, m.resize(m.conv(y, stride=2), y))


def _context(m: _Maker, y: str) -> str:
    mean = m.conv(m.node("GlobalAveragePool", y), side=1, pad=0)
    return m.node("Add", y, m.node("Expand", mean, m.list(*m.shape(y))))


def _context_resized(m: _Maker, y: str) -> str:
    mean = m.conv(m.node("GlobalAveragePool", y), side=1, pad=0)
    return m.conv(m.node("Concat", y, m.resize(mean, y, "nearest"), axis=1), into=2 * CHANNELS)


def _pooled(m: _Maker, y: str) -> str:
    kind, side = str(m.random.choice(["AveragePool", "MaxPool"])), int(m.random.choice([2, 3]))
    small = m.node(kind, y, kernel_shape=[side] * 2, strides=[2, 2], pads=[side // 2] * 4 if side == 3 else [0] * 4)
    return m.node("Add", y, m.resize(m.conv(small), y))


def _grid(m: _Maker, y: str) -> str:
    """Means of a grid of 2×2, as adaptive pooling gives."""
    n, c, h, w = m.shape(y)
    two = m.number(2)
    parts = m.node("Reshape", y, m.list(n, c, two, m.node("Div", h, two), two, m.node("Div", w, two)))
    return m.node("Add", y, m.resize(m.conv(m.node("ReduceMean", parts, m.number(3, 5), keepdims=0)), y))


def _same_padded(m: _Maker, y: str) -> str:
    """TensorFlow's padding for a convolution of stride 2."""
    h, w = (m.side(y, axis) for axis in (2, 3))
    two, one, zero = m.number(2), m.number(1), m.number(0)
    lacking = []
    for side in (h, w):
        cells = m.node("Div", m.node("Add", side, one), two)
        wanted = m.node("Add", m.node("Mul", m.node("Sub", cells, one), two), m.number(3))
        lacking.append(m.node("Max", m.node("Sub", wanted, side), zero))
    before = [m.node("Div", each, two) for each in lacking]
    behind = [m.node("Sub", each, first) for each, first in zip(lacking, before, strict=True)]
    pads = m.list(zero, zero, *before, zero, zero, *behind)
    return m.node("Add", y, m.resize(m.conv(m.node("Pad", y, pads), stride=2, pad=0), y))


def _skip_padded(m: _Maker, y: str) -> str:
    """Upsampled by 2, and padded to what it is joined with."""
    low = m.conv(y, stride=2)
    up = m.node("Resize", low, "", m.weight(np.array([1, 1, 2, 2], np.float32)), mode="nearest")
    zero = m.number(0)
    lacking = [m.node("Sub", m.side(y, axis), m.side(up, axis)) for axis in (2, 3)]
    return m.node("Add", y, m.node("Pad", up, m.list(zero, zero, zero, zero, zero, zero, *lacking)))


def _cropped(m: _Maker, y: str) -> str:
    wide = m.conv(m.node("Pad", y, m.number(0, 0, 3, 3, 0, 0, 3, 3)))
    four, h, w = m.number(3), m.side(y, 2), m.side(y, 3)
    ends = m.list(m.node("Add", h, four), m.node("Add", w, four))
    return m.node("Slice", wide, m.number(3, 3), ends, m.number(2, 3))


def _halves(m: _Maker, y: str) -> str:
    """The left half and the right half change places."""
    axis, whole = int(m.random.choice([2, 3])), None
    whole = m.side(y, axis)
    half, place = m.node("Div", whole, m.number(2)), m.number(axis)
    first = m.node("Slice", y, m.number(0), half, place)
    return m.conv(m.node("Concat", m.node("Slice", y, half, whole, place), first, axis=axis))


def _expanded(m: _Maker, y: str) -> str:
    vector = m.weight(m.random.standard_normal((1, CHANNELS, 1, 1)).astype(np.float32))
    return m.node("Add", y, m.node("Expand", vector, m.list(*m.shape(y))))


BLOCKS = {
    block.__name__.strip("_"): block
    for block in (
        _flattened, _shuffled, _attention, _pixel_shuffle, _down_and_up, _context, _context_resized, _pooled, _grid,
        _same_padded, _skip_padded, _cropped, _halves, _expanded,
    )
}  # fmt: skip


def mutant(seed: int) -> Mutant:
    """The network of a seed, and the same with sizes baked in."""
    random = np.random.default_rng(seed)
    traced = TRACED[random.integers(len(TRACED))]
    m = _Maker(random)
    y = m.node("Relu", m.conv("image", into=3, stride=2))
    if random.random() < 0.6:
        y = m.node("Relu", m.conv(y, stride=2))
    chosen = [str(name) for name in random.choice(list(BLOCKS), size=random.integers(1, 4))]
    for name in chosen:
        y = m.node("Relu", m.conv(BLOCKS[name](m, y)))
    scores = m.conv(y, out=CLASSES, side=1, pad=0)
    n, h, w = (m.side("image", axis) for axis in (0, 2, 3))
    mode = {"mode": "linear", "coordinate_transformation_mode": str(random.choice(["half_pixel", "align_corners"]))}
    m.node("Resize", scores, "", "", m.list(n, m.number(CLASSES), h, w), **mode)
    m.nodes[-1].output[0] = "scores"
    free = _model(m, ["N", 3, "H", "W"])
    baked, nodes = _baked(m, free, traced)
    return Mutant(seed, free, baked, chosen, nodes, traced)


def _model(m: _Maker, shape: list[int | str]) -> ModelProto:
    tensors = [numpy_helper.from_array(value, name) for name, value in m.weights.items()]
    graph = helper.make_graph(
        m.nodes, "mutant", [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, None)], tensors,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _baked(m: _Maker, free: ModelProto, traced: tuple[int, int]) -> tuple[ModelProto, list[str]]:
    """The network with numbers of the traced size in some of its nodes, and their names."""
    known = set(m.weights)
    places = [
        (node.name, place)
        for node in m.nodes
        for place in BAKED_INPUTS.get(node.op_type, ())
        if len(node.input) > place and node.input[place] not in known
    ]
    pools = [node.name for node in m.nodes if node.op_type in ("GlobalAveragePool",)]
    share = m.random.choice([0.3, 0.7, 1.0])
    taken = [each for each in places if m.random.random() < share]
    if not taken and places:
        taken = [places[m.random.integers(len(places))]]
    by_name = {node.name: node for node in m.nodes}
    wanted = [by_name[name].input[place] for name, place in taken] + [by_name[name].input[0] for name in pools]
    values = _values(free, wanted, traced)
    baked = onnx.ModelProto()
    baked.CopyFrom(free)
    copies = {node.name: node for node in baked.graph.node}
    numbers = dict(zip(taken, values, strict=False))
    before: list[tuple[str, NodeProto]] = []
    for (name, place), value in numbers.items():
        node = copies[name]
        if node.op_type == "Pad" and m.random.random() < 0.5:  # a number less the size, as of a trace in half
            before += [(name, each) for each in _half_traced(baked, node, value, traced, free)]
            continue
        constant = f"{name}/baked_{place}"
        baked.graph.initializer.append(numpy_helper.from_array(value, constant))
        node.input[place] = constant
    done = [f"{copies[name].op_type} {name}" for name, _ in taken]
    for name, value in zip(pools, values[len(taken) :], strict=True):
        if m.random.random() < 0.7:
            node = copies[name]
            node.op_type = "AveragePool"
            node.attribute.append(helper.make_attribute("kernel_shape", list(value.shape[2:])))
            done.append(f"AveragePool {name}")
    nodes = []
    for node in baked.graph.node:
        nodes += [each for name, each in before if name == node.name]
        nodes.append(node)
    copied = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del baked.graph.node[:]
    baked.graph.node.extend(copied)
    named = m.random.random() < 0.25
    if not named:
        image = baked.graph.input[0]
        shape = [1, 3, *traced]
        image.CopyFrom(helper.make_tensor_value_info("image", TensorProto.FLOAT, shape))
    return baked, done + (["by names"] if named else [])


def _half_traced(
    baked: ModelProto, node: NodeProto, pads: np.ndarray, traced: tuple[int, int], free: ModelProto
) -> list[NodeProto]:
    """Nodes that compute amounts of padding as numbers less the size of what is padded."""
    shape = _values(free, [node.input[0]], traced)[0].shape
    rank, name = len(shape), node.name
    totals = [int(pads[axis] + pads[axis + rank]) for axis in range(rank)]
    target = np.array([side + total for side, total in zip(shape, totals, strict=True)], np.int64)[2:]
    values = {
        "target": target, "two": np.array([2], np.int64), "four": np.array([4], np.int64),
        "halves": np.array([2, 2], np.int64), "zeros": np.zeros(2, np.int64),
    }  # fmt: skip
    baked.graph.initializer.extend(numpy_helper.from_array(v, f"{name}/{key}") for key, v in values.items())
    make = helper.make_node
    all_behind = not pads[2:4].any()
    nodes = [
        make("Shape", [node.input[0]], [f"{name}/shape"]),
        make("Slice", [f"{name}/shape", f"{name}/two", f"{name}/four"], [f"{name}/hw"]),
        make("Sub", [f"{name}/target", f"{name}/hw"], [f"{name}/lacking"]),
        make("Div", [f"{name}/lacking", f"{name}/halves"], [f"{name}/half"]),
        make("Identity" if not all_behind else "Mul",
             [f"{name}/half"] if not all_behind else [f"{name}/half", f"{name}/zeros"], [f"{name}/before"]),
        make("Sub", [f"{name}/lacking", f"{name}/before"], [f"{name}/behind"]),
        make("Concat", [f"{name}/{part}" for part in ("zeros", "before", "zeros", "behind")], [f"{name}/pads"], axis=0),
    ]  # fmt: skip
    node.input[1] = f"{name}/pads"
    return nodes


def _values(model: ModelProto, names: list[str], size: tuple[int, int]) -> list[np.ndarray]:
    if not names:
        return []
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    del probed.graph.output[:]
    probed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names))
    run = onnxruntime.InferenceSession(probed.SerializeToString(), _quiet(), providers=["CPUExecutionProvider"])
    unique = list(dict.fromkeys(names))
    found = dict(zip(unique, run.run(unique, {"image": np.zeros((1, 3, *size), np.float32)}), strict=True))
    return [found[name] for name in names]


def _quiet() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    return options


def judge(made: Mutant, folder: Path) -> tuple[str, str]:
    """(`refused`, `equal`, `said` or `WRONG`, and more of it) of what an import makes of a mutant.

    `said`: it differs somewhere, and a note names the guess.
    """
    path = folder / "mutant.onnx"
    path.write_bytes(made.baked.SerializeToString())
    try:
        imported = import_model(path)
    except DeployError as error:
        return "refused", str(error)
    before = onnxruntime.InferenceSession(made.free.SerializeToString(), _quiet(), providers=["CPUExecutionProvider"])
    after = onnxruntime.InferenceSession(
        imported.model.SerializeToString(), _quiet(), providers=["CPUExecutionProvider"]
    )
    random, compared = np.random.default_rng(made.seed), 0
    for size in _sizes(imported):
        image = random.standard_normal((1, 3, *size)).astype(np.float32)
        try:
            expected = before.run(None, {"image": image})[0]
        except Exception:  # the network itself does not take it
            continue
        scores = after.run(None, {after.get_inputs()[0].name: image})[0]
        compared += 1
        apart = np.inf if scores.shape != expected.shape else np.abs(scores - expected).max() / np.ptp(expected)
        if not apart <= TOLERANCE:
            said = [note for note in imported.notes if SAID in note]
            return ("said" if said else "WRONG"), f"{apart:.1e} at {size}; {' | '.join(said or imported.notes)}"
    return "equal", f"{compared} sizes"


def _sizes(imported: ImportedModel) -> list[tuple[int, int]]:
    """Sizes that the network takes without being padded or resized."""
    multiple, least = imported.sizes.multiple, imported.sizes.smallest
    high = [
        tuple(max(-(-side // multiple) * multiple, -(-least // multiple) * multiple) for side in size)
        for size in OTHERS
    ]
    return list(dict.fromkeys(high))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="of networks")
    parser.add_argument("--first", type=int, default=0, help="seed")
    parser.add_argument("--refusals", action="store_true", help="print why networks are refused")
    options = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.first, options.first + options.count):
            made = mutant(seed)
            verdict, more = judge(made, Path(folder))
            counts[verdict] += 1
            if verdict in ("WRONG", "said"):
                print(f"{verdict}: seed {seed}, {made.traced}, {made.blocks}, {made.nodes}: {more}", flush=True)
            elif verdict == "refused" and options.refusals:
                print(f"refused: seed {seed}, {made.blocks}: {more.partition(': ')[2]}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    raise SystemExit(1 if counts["WRONG"] else 0)


if __name__ == "__main__":
    main()
