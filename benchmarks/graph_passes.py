"""How the time of graph passes and analyses grows with the graph: chains of synthetic nodes, each made for one of them.

    python -m benchmarks.graph_passes [--nodes 400,800,1600,3200,6400] [--only cancel_transposes] [--json FILE]

Times are CPU seconds of one process, the best of some runs, so that a busy machine matters little. Growth is the power
of the number of nodes that fits the times, from the second size on (the first pays for what is loaded once): 1 is
linear, 2 quadratic.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from fcn_deploy.export.analysis.channel_layout import channels_of_input
from fcn_deploy.export.analysis.crossings import crossings
from fcn_deploy.export.analysis.decision import label_maker
from fcn_deploy.export.analysis.receptive_field import receptive_field
from fcn_deploy.export.dynamic_shapes.free_sizes import free_sizes
from fcn_deploy.export.passes.bilinear_deconv import bilinear_deconv
from fcn_deploy.export.passes.cancel_transposes import cancel_transposes
from fcn_deploy.export.passes.cut_decision import cut_decision
from fcn_deploy.export.passes.fold_constants import fold_constants
from fcn_deploy.export.passes.fuse_padding import fuse_padding
from fcn_deploy.export.passes.image_input import image_input
from fcn_deploy.export.passes.pad_and_crop import pad_and_crop
from fcn_deploy.export.passes.raw_input import raw_input
from fcn_deploy.export.passes.resolve_branches import resolve_branches
from fcn_deploy.export.passes.reverse_channels import reverse_channels
from fcn_deploy.export.passes.split_head import split_head
from fcn_deploy.export.quantization.half import emulate_half, half
from fcn_deploy.export.quantization.quantize import SCHEMES, measured_tensors, quantize
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fcn_deploy import ModelCard

NODES = (400, 800, 1600, 3200, 6400)
CARD = ModelCard(("a", "b"))
WEIGHT = np.random.default_rng(0).normal(size=(3, 3, 1, 1)).astype(np.float32)
CONSTANTS = {
    "weight": WEIGHT,
    "one": np.ones(1, np.int64),
    "axes": np.array([2, 3], np.int64),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
    "groups": np.array([0, 3, 1], np.int64),
    "whole": np.array([0, 3], np.int64),
    "traced_groups": np.array([1, 3, 1, 64, 96], np.int64),
    "traced": np.array([1, 3, 64, 96], np.int64),
    "scales": np.array([1, 1, 2, 2], np.float32),
}
Step = tuple[list[NodeProto], str]


def chain(step: Callable[[str, int], Step], nodes: int, last: Sequence[NodeProto] = ()) -> ModelProto:
    """A model `image` → `logits` of about so many nodes.

    Args:
        step: (name of a tensor, number of the step) → (some nodes, name of what they give).
        last: nodes from `end` to `logits`; none: an Identity.
    """
    made, name = [], "image"
    while len(made) < nodes:
        more, name = step(name, len(made))
        made += more
    made.append(helper.make_node("Identity", [name], ["end"]))
    made += last or [helper.make_node("Identity", ["end"], ["logits"])]
    read = {name for node in made for name in node.input}
    graph = helper.make_graph(
        made,
        "chain",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3, "h", "w"])],
        [numpy_helper.from_array(value, name) for name, value in CONSTANTS.items() if name in read],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def relu(name: str, index: int) -> Step:
    return [helper.make_node("Relu", [name], [f"r{index}"])], f"r{index}"


def transposed(name: str, index: int) -> Step:
    """An operator in [N,H,W,C], as TensorFlow's exporters write it."""
    names = [f"{part}{index}" for part in "abc"]
    nodes = [
        helper.make_node("Transpose", [name], [names[0]], perm=[0, 2, 3, 1]),
        helper.make_node("Relu", [names[0]], [names[1]]),
        helper.make_node("Transpose", [names[1]], [names[2]], perm=[0, 3, 1, 2]),
    ]
    return nodes, names[2]


def padded(name: str, index: int) -> Step:
    nodes = [
        helper.make_node("Pad", [name, "pads"], [f"p{index}"]),
        helper.make_node("Conv", [f"p{index}", "weight"], [f"c{index}"]),
    ]
    return nodes, f"c{index}"


def convolved(name: str, index: int) -> Step:
    nodes = [
        helper.make_node("Conv", [name, "weight"], [f"c{index}"], name=f"conv{index}"),
        helper.make_node("Relu", [f"c{index}"], [f"r{index}"]),
        helper.make_node("Add", [name, f"r{index}"], [f"a{index}"]),
    ]
    return nodes, f"a{index}"


def constant(name: str, index: int) -> Step:
    """A constant that is made of another, and used."""
    value = numpy_helper.from_array(np.float32([index + 1]))
    nodes = [
        helper.make_node("Constant", [], [f"k{index}"], value=value),
        helper.make_node("Neg", [f"k{index}"], [f"n{index}"]),
        helper.make_node("Add", [name, f"n{index}"], [f"a{index}"]),
    ]
    return nodes, f"a{index}"


def shuffled(name: str, index: int) -> Step:
    """Channels in groups, and back in another order, as view, transpose and view are exported: with sizes computed."""
    nodes = [
        helper.make_node("Shape", [name], [f"s{index}"], start=2),
        helper.make_node("Concat", ["groups", f"s{index}"], [f"g{index}"], axis=0),
        helper.make_node("Reshape", [name, f"g{index}"], [f"a{index}"]),
        helper.make_node("Transpose", [f"a{index}"], [f"b{index}"], perm=[0, 2, 1, 3, 4]),
        helper.make_node("Concat", ["whole", f"s{index}"], [f"w{index}"], axis=0),
        helper.make_node("Reshape", [f"b{index}", f"w{index}"], [f"c{index}"]),
    ]
    return nodes, f"c{index}"


def baked(name: str, index: int) -> Step:
    """As shuffled, with the sizes of a traced image of 64×96."""
    nodes = [
        helper.make_node("Reshape", [name, "traced_groups"], [f"a{index}"]),
        helper.make_node("Transpose", [f"a{index}"], [f"b{index}"], perm=[0, 2, 1, 3, 4]),
        helper.make_node("Reshape", [f"b{index}", "traced"], [f"c{index}"]),
    ]
    return nodes, f"c{index}"


def negated(name: str, index: int) -> Step:
    """What label_maker follows."""
    return [helper.make_node("Neg", [name], [f"n{index}"])], f"n{index}"


def branched(name: str, index: int) -> Step:
    """An If that asks whether a convolution has one channel."""
    then, other = (
        helper.make_graph([helper.make_node(kind, [f"c{index}"], [f"{kind}{index}"])], kind, [],
                          [helper.make_tensor_value_info(f"{kind}{index}", TensorProto.FLOAT, None)])
        for kind in ("Neg", "Abs")
    )  # fmt: skip
    nodes = [
        helper.make_node("Conv", [name, "weight"], [f"c{index}"]),
        helper.make_node("Shape", [f"c{index}"], [f"s{index}"]),
        helper.make_node("Gather", [f"s{index}", "one"], [f"g{index}"]),
        helper.make_node("Equal", [f"g{index}", "one"], [f"e{index}"]),
        helper.make_node("If", [f"e{index}"], [f"i{index}"], then_branch=then, else_branch=other),
    ]
    return nodes, f"i{index}"


def full_size() -> list[NodeProto]:
    return [helper.make_node("Resize", ["end", "", "scales"], ["logits"], mode="linear")]


def quantized(model: ModelProto) -> ModelProto:
    """With Q/DQ for the CPU, from ranges that nobody measured."""
    return quantize(model, dict.fromkeys(measured_tensors(model), (-1.0, 1.0)), SCHEMES["cpu"])


@dataclass(frozen=True)
class Subject:
    """What is timed.

    Attributes:
        run: on a model.
        model: number of nodes → the model.
    """

    run: Callable[[ModelProto], object]
    model: Callable[[int], ModelProto]


def fixed_size(model: ModelProto) -> ModelProto:
    """The same for one image of 64×96, so that its sizes are to be freed."""
    for value in (*model.graph.input, *model.graph.output):
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, [1, 3, 64, 96]))
    return model


SUBJECTS = {
    "cancel_transposes": Subject(cancel_transposes, lambda n: chain(transposed, n)),
    "fuse_padding": Subject(fuse_padding, lambda n: chain(padded, n)),
    "fold_constants": Subject(fold_constants, lambda n: chain(constant, n)),
    "split_head": Subject(split_head, lambda n: chain(convolved, n, full_size())),
    "split_head, padded": Subject(split_head, lambda n: pad_and_crop(chain(convolved, n, full_size()), 4).model),
    "cut_decision": Subject(
        cut_decision, lambda n: chain(convolved, n, [helper.make_node("ArgMax", ["end"], ["logits"], axis=1)])
    ),
    "label_maker": Subject(label_maker, lambda n: chain(negated, n)),
    "bilinear_deconv": Subject(bilinear_deconv, lambda n: chain(convolved, n)),
    "image_input": Subject(lambda model: image_input(model, 3), lambda n: chain(relu, n)),
    "channels_of_input": Subject(channels_of_input, lambda n: chain(relu, n)),
    "reverse_channels": Subject(reverse_channels, lambda n: chain(convolved, n)),
    "reverse_channels, gathered": Subject(reverse_channels, lambda n: chain(relu, n)),
    "resolve_branches": Subject(resolve_branches, lambda n: chain(branched, n)),
    "pad_and_crop": Subject(lambda model: pad_and_crop(model, 4), lambda n: chain(convolved, n)),
    "raw_input": Subject(
        lambda pair: raw_input(*pair, CARD), lambda n: (quantized(core := chain(convolved, n)), core)
    ),
    "quantize": Subject(quantized, lambda n: chain(convolved, n)),
    "half": Subject(half, lambda n: chain(convolved, n)),
    "emulate_half": Subject(emulate_half, lambda n: chain(convolved, n)),
    "crossings of cut_core": Subject(lambda model: crossings(model, Counter()), lambda n: chain(convolved, n)),
    "receptive_field": Subject(receptive_field, lambda n: renamed(chain(convolved, n))),
    "receptive_field, reshapes": Subject(receptive_field, lambda n: renamed(chain(shuffled, n))),
    "free_sizes": Subject(free_sizes, lambda n: fixed_size(chain(convolved, n))),
    "free_sizes, reshapes": Subject(free_sizes, lambda n: fixed_size(chain(baked, n))),
}  # fmt: skip


def renamed(model: ModelProto) -> ModelProto:
    """As a core, whose output is `scores`."""
    model.graph.node[-1].output[0] = model.graph.output[0].name = "scores"
    return model


@dataclass(frozen=True)
class Growth:
    """How the time of one of SUBJECTS grows.

    Attributes:
        name: of it.
        seconds: by number of nodes.
        power: of the number of nodes that fits the times; 1 is linear.
    """

    name: str
    seconds: dict[int, float]
    power: float


def seconds(subject: Subject, nodes: int, runs: int, limit: float) -> float:
    """The best of some runs, of which no more begin after `limit` seconds."""
    model, best, start = subject.model(nodes), float("inf"), time.process_time()
    for _ in range(runs):
        begun = time.process_time()
        subject.run(model)
        best = min(best, time.process_time() - begun)
        if time.process_time() - start > limit:
            break
    return best


def power(times: dict[int, float]) -> float:
    """The slope of the times over the nodes, both as logarithms, from the second size on; NaN of one or two sizes."""
    sizes = sorted(times)[1:]
    if len(sizes) < 2:
        return float("nan")
    return float(np.polyfit(np.log(sizes), np.log([times[size] for size in sizes]), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", default=",".join(map(str, NODES)), help="sizes of the chains")
    parser.add_argument("--only", nargs="*", help="names, or how they begin; default: all")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--limit", type=float, default=20, help="seconds after which no further run or size is begun")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    sizes = [int(size) for size in options.nodes.split(",")]
    chosen = [name for name in SUBJECTS if not options.only or name.startswith(tuple(options.only))]
    width = max(map(len, chosen))
    print(f"{'seconds at':{width}}", *(f"{size:>8}" for size in sizes), "   growth")
    results = []
    for name in chosen:
        times: dict[int, float] = {}
        for size in sizes:
            if max(times.values(), default=0) < options.limit:
                times[size] = seconds(SUBJECTS[name], size, options.runs, options.limit)
        results.append(Growth(name, times, power(times)))
        cells = (f"{times[size]:8.3f}" if size in times else f"{'–':>8}" for size in sizes)
        print(f"{name:{width}}", *cells, f"   n^{results[-1].power:.2f}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
