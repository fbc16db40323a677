"""The most that any exact `--reuse` can save with a network: what a layer's input leaves equal, for nothing.

    python -m benchmarks.reuse_ceiling MODEL.onnx [--data DIR] [--size 544x960]

Two frames as those of `benchmarks.reuse` are run through the float32 core layer by layer. A cell of a convolution's
result must be computed again if one of the cells that it reads differs, in any channel; every other is free, without
halos, copies, comparisons or runs of their own. `again` is the share of the cells, by stride in pixels, `work` the
share of the multiplications and `time` that of the time, as ONNX Runtime profiles its nodes by the size of what they
give. One over the sums of both, weighted by `again`, is the most that frames could gain.
"""

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from fcn_deploy.export.build.core import core_of, optimise_offline
from fcn_deploy.export.graph.edit import attributes, clone, initializers
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.quantization.quantize import convolutions
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.pixels.prepare import prepare
from onnx import ModelProto, ValueInfoProto

from benchmarks.common import fitted, photographs
from benchmarks.reuse import frames


def again(differs: np.ndarray, size: tuple[int, int], node: dict, kernel: tuple[int, int]) -> np.ndarray:
    """Cells of a convolution's result, bool [h, w], that read a cell that differs, bool [H, W]."""
    (down, across), pads = node.get("strides", [1, 1]), node.get("pads", [0] * 4)
    far = [step * (side - 1) for step, side in zip(node.get("dilations", [1, 1]), kernel, strict=True)]
    padded = np.pad(differs, ((pads[0], pads[2] + far[0] + down), (pads[1], pads[3] + far[1] + across)))
    found = np.zeros(size, bool)
    for y in np.linspace(0, far[0], kernel[0]).astype(int):
        for x in np.linspace(0, far[1], kernel[1]).astype(int):
            found |= padded[y::down, x::across][: size[0], : size[1]]
    return found


def times(core: ModelProto, x: np.ndarray) -> Counter:
    """Stride in pixels of the rows that nodes give → their microseconds, of one thread."""
    with tempfile.TemporaryDirectory() as folder:
        run = session(core.SerializeToString(), 1, profile_to=Path(folder) / "p")
        for _ in range(4):
            run.run(None, {"image": x})
        events = json.loads(Path(run.end_profiling()).read_text())
    found: Counter = Counter()
    for event in events:
        for each in event.get("args", {}).get("output_type_shape", []):
            for shape in each.values():
                if len(shape) == 4 and event["name"].endswith("_kernel_time") and x.shape[2] >= shape[2] > 1:
                    found[x.shape[2] // shape[2]] += event["dur"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", default="digits", help="photographs, a folder or `digits`; they are resized")
    parser.add_argument("--size", default="544x960", help="of the frames: all layers are held, 3 kB a pixel and frame")
    options = parser.parse_args()
    height, width = map(int, options.size.split("x"))
    found, photos = core_of(import_model(options.model)), photographs(options.data)
    core = optimise_offline(found.model)
    pictures = [fitted(photos.read(index), height, width) for index in range(min(8, len(photos)))]
    nodes, weights, tapped = convolutions(core), initializers(core), clone(core)
    names = list(dict.fromkeys(n for node in nodes for n in (node.input[0], node.output[0]) if n != "image"))
    del tapped.graph.output[:]
    tapped.graph.output.extend(ValueInfoProto(name=name) for name in names)
    run = session(tapped.SerializeToString())
    for kind in ("5 % of blocks", "in one place"):
        inputs = [prepare(frame, found.card) for frame in frames(kind, pictures, 2)]
        one, other = ({"image": x} | dict(zip(names, run.run(names, {"image": x}), strict=True)) for x in inputs)
        work, cells, needed = Counter(), Counter(), Counter()
        for node in nodes:
            size, weight = one[node.output[0]].shape[2:], weights[node.input[1]]
            differs = (one[node.input[0]] != other[node.input[0]]).any((0, 1))
            stride, cost = inputs[0].shape[2] // size[0], int(np.prod(size)) * weight.size
            work[stride] += cost
            cells[stride] += 1
            needed[stride] += float(again(differs, size, attributes(node), weight.shape[2:]).mean())
        spent = times(core, inputs[0])
        print(f"{kind}\n{'stride':>8} {'work':>7} {'time':>7} {'again':>7}")
        left = {"work": 0.0, "time": 0.0}
        for stride in sorted(work):
            share, by_time = work[stride] / work.total(), spent[stride] / sum(spent[s] for s in work)
            repeated = needed[stride] / cells[stride]
            left["work"] += share * repeated
            left["time"] += by_time * repeated
            print(f"{stride:8} {share:7.1%} {by_time:7.1%} {repeated:7.1%}")
        print(", ".join(f"by {what} at most {1 / part:.2f}×" for what, part in left.items()), flush=True)


if __name__ == "__main__":
    main()
