"""A fully convolutional network against the same one run patch by patch (Long, Shelhamer, Darrell, 2015, section 3.1).

    python -m benchmarks.patchwise [--networks alexnet,efficientnet-lite0] [--runtimes torch,onnxruntime]

The classifier, its dense layers as they are, is slid over a 500×500 image at its stride of 32: 10×10 windows of 224×224
(of the image padded to 512×512), in batches; made convolutional, it gives the same grid in one pass. The paper found
the pass more than five times as fast, for AlexNet. Then at stride 8, as dense as FCN-8s's scores: a window for each of
its 63×63 cells, by the time of those 100, against FCN-8s itself. Weights are random: no time depends on them.

Also printed: memory, as what the peak of a process grows by; and how far the two agree. At 224×224 they are the same
function. In larger images they differ as a window's border is padded with zeros where the pass sees the image; patches
that hold a cell's whole receptive field have the pass's own values (AlexNet: 355 pixels; EfficientNet-Lite0's is larger
than the image).
"""

import argparse
import ctypes
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from fcn_deploy.fcn import backbones
from fcn_deploy.fcn.architecture import Architecture
from fcn_deploy.fcn.backbones import scaled
from fcn_deploy.fcn.convolutionalize import convolutionalize
from fcn_deploy.fcn.model import build_network
from torch import nn

from benchmarks.common import fitted, memory, photographs, spread

SIDE, WINDOW, STRIDE, DENSE = 500, 224, 32, 8  # pixels
NETWORKS = ("alexnet", "efficientnet-lite0")
RUNTIMES = ("torch", "onnxruntime")
AROUND = 3  # strides: a cell of AlexNet sees 66 pixels before its window and 65 after it


class Features(nn.Module):
    """EfficientNet-Lite0's last features, [N, 1280, H/32, W/32]."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        self.backbone = backbones.build_backbone("efficientnet-lite0", width=width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.backbone(x)[32]


def alexnet(width: float = 1.0) -> nn.Sequential:
    """Krizhevsky's network (2014) as torchvision has it."""
    a, b, c, d, dense = (scaled(channels, width) for channels in (64, 192, 384, 256, 4096))
    return nn.Sequential(
        nn.Conv2d(3, a, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(a, b, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(b, c, 3, padding=1), nn.ReLU(),
        nn.Conv2d(c, d, 3, padding=1), nn.ReLU(),
        nn.Conv2d(d, d, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Flatten(), nn.Dropout(), nn.Linear(d * 6 * 6, dense), nn.ReLU(),
        nn.Dropout(), nn.Linear(dense, dense), nn.ReLU(), nn.Linear(dense, 1000),
    )  # fmt: skip


def efficientnet(width: float = 1.0) -> nn.Sequential:
    """EfficientNet-Lite0 for ImageNet's classes."""
    features = Features(width)
    channels = features.backbone.features[32]
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


def classifier(name: str, width: float = 1.0) -> nn.Module:
    """By name, in evaluation mode, with random weights that keep the signal's size."""
    torch.manual_seed(0)
    if name == "alexnet":
        net = alexnet(width)
        for layer in net.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        return net.eval()
    net = efficientnet(width)
    with torch.no_grad():  # batch norm's statistics fit the weights
        net.train()(torch.randn(4, 3, 96, 96))
    return net.eval()


def windows(image: np.ndarray, side: int, stride: int, cells: int) -> np.ndarray:
    """[cells², 3, side, side]: windows at every `stride` pixels of an image [3, H, W] whose zeros go on beyond it."""
    reach = (cells - 1) * stride + side
    padded = np.zeros((3, max(reach, image.shape[1]), max(reach, image.shape[2])), np.float32)
    padded[:, : image.shape[1], : image.shape[2]] = image
    return np.stack(
        [
            padded[:, row * stride : row * stride + side, column * stride : column * stride + side]
            for row in range(cells)
            for column in range(cells)
        ]
    )


Call = Callable[[np.ndarray], np.ndarray]


def prepared(net: nn.Module, runtime: str, threads: int, arena: bool = True) -> Call:
    """[N, 3, H, W] → the network's output, of any N, H and W. Without an arena ONNX Runtime keeps nothing of a call."""
    if runtime == "torch":
        torch.set_num_threads(threads)
        net = net.to(memory_format=torch.channels_last)

        def run(x: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return net(torch.from_numpy(x).to(memory_format=torch.channels_last)).numpy()

        return run
    import tempfile
    import warnings

    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older exporter, which takes free sizes as they are
        path = Path(folder) / "net.onnx"
        free = {"image": {0: "N", 2: "H", 3: "W"}}
        example = torch.zeros(1, 3, WINDOW, WINDOW)
        torch.onnx.export(net, (example,), path, input_names=["image"], dynamic_axes=free, dynamo=False)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_cpu_mem_arena = arena
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"image": x})[0]


def in_batches(call: Call, patches: np.ndarray, batch: int) -> np.ndarray:
    parts = [call(patches[start : start + batch]) for start in range(0, len(patches), batch)]
    return np.concatenate([part.reshape(len(part), -1) for part in parts])


def photograph(data: str) -> np.ndarray:
    """[3, SIDE, SIDE] float32, normalised."""
    stream = photographs(data)
    image = fitted(stream.read(0), SIDE, SIDE).astype(np.float32)
    return np.ascontiguousarray(((image - 127) / 128).transpose(2, 0, 1))


def padded(image: np.ndarray, multiple: int = STRIDE) -> np.ndarray:
    """[1, 3, H, W] with zeros to the next multiple."""
    return np.pad(image, ((0, 0), *((0, -side % multiple) for side in image.shape[1:])))[None]


def timed(name: str, runtime: str, options: dict) -> dict:
    """Times of both ways in turn, and how far they agree. In a process of its own."""
    image, threads, batch = photograph(options["data"]), options["threads"], options["batch"]
    net = classifier(name, options["width"])
    convolutional = convolutionalize(net, (3, WINDOW, WINDOW))
    whole, patch = prepared(convolutional, runtime, threads), prepared(net, runtime, threads)
    full = padded(image)
    heat = whole(full)[0]
    cells = heat.shape[1]
    patches = windows(image, WINDOW, STRIDE, cells)
    ways = {"one pass": lambda: whole(full), "patches": lambda: in_batches(patch, patches, batch)}
    ways["patches, one at a time"] = lambda: in_batches(patch, patches[: options["single"]], 1)
    share = {"patches, one at a time": len(patches) / min(options["single"], len(patches))}
    dense = -(-SIDE // DENSE)
    if name == "efficientnet-lite0":
        fine = build_network(Architecture(classes=1000, width=options["width"])).eval()
        scores = prepared(_Core(fine), runtime, threads)
        ways["one pass, stride 8 (FCN-8s)"] = lambda: scores(full)
    slid = in_batches(patch, patches, batch).reshape(cells, cells, -1).transpose(2, 0, 1)
    times: dict[str, list[float]] = {way: [] for way in ways}
    random = np.random.default_rng(0)
    for way in ways.values():
        way()
    for _ in range(options["rounds"]):
        for way in random.permutation(list(ways)):
            started = time.perf_counter()
            ways[way]()
            times[way].append((time.perf_counter() - started) * 1e3 * share.get(way, 1))
    times["patches, stride 8"] = [ms * dense**2 / len(patches) for ms in times["patches"]]
    few = patches[:1]
    row = {
        "network": name, "runtime": runtime, "grid": [cells, cells], "dense": [dense, dense], "batch": batch,
        "ms": {way: spread(found) for way, found in times.items()},
        "ratio": spread(np.divide(times["patches"], times["one pass"])),
        "ratio_single": spread(np.divide(times["patches, one at a time"], times["one pass"])),
        # The classifier itself: the same numbers, up to rounding.
        "at_224": difference(whole(few).reshape(1, -1), patch(few)),
        "windows_correlation": float(np.corrcoef(slid.ravel(), heat.ravel())[0, 1]),
        "windows_top1": float((slid.argmax(0) == heat.argmax(0)).mean()),
    }  # fmt: skip
    if "one pass, stride 8 (FCN-8s)" in times:
        row["ratio_dense"] = spread(np.divide(times["patches, stride 8"], times["one pass, stride 8 (FCN-8s)"]))
    if name == "alexnet":
        row["at_field"] = field_difference(whole, full, heat)
    return row


class _Core(nn.Module):
    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.core(x)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """The largest, as a share of the values' range."""
    return float(np.abs(one - other).max() / np.ptp(other))


def field_difference(whole: Call, full: np.ndarray, heat: np.ndarray) -> float:
    """Cells of the pass against the middle cell of patches that hold the cell's whole receptive field."""
    worst, side = 0.0, WINDOW + 2 * AROUND * STRIDE
    for row, column in ((AROUND, AROUND), (AROUND, AROUND + 1), (AROUND + 2, AROUND)):
        y, x = ((place - AROUND) * STRIDE for place in (row, column))
        part = whole(np.ascontiguousarray(full[:, :, y : y + side, x : x + side]))[0]
        worst = max(worst, difference(part[:, AROUND, AROUND], heat[:, row, column]))
    return worst


def remembered(name: str, runtime: str, way: str, options: dict) -> int:
    """Bytes that one way takes beyond the network itself. In a process of its own."""
    image, net = photograph(options["data"]), classifier(name, options["width"])
    if way == "one pass":
        net = convolutionalize(net, (3, WINDOW, WINDOW))
    call = prepared(net, runtime, options["threads"], arena=False)
    call(np.zeros((1, 3, WINDOW, WINDOW), np.float32))
    # What building the network left is given back, where glibc can, or a call would find its memory there; Linux then
    # forgets the peak so far.
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory()["peak"]
    if way == "one pass":
        call(padded(image))
    else:
        cells = (-(-SIDE // STRIDE) * STRIDE - WINDOW) // STRIDE + 1
        patches = windows(image, WINDOW, STRIDE, cells)
        in_batches(call, patches, {"patches": options["batch"], "patches, all at once": len(patches)}[way])
    return memory()["peak"] - before


def apart(work: Callable, *arguments):
    """In a new process, whose memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--runtimes", default=",".join(RUNTIMES))
    parser.add_argument("--data", default="digits", help="where the photograph is from")
    parser.add_argument("--batch", type=int, default=20, help="patches at a time")
    parser.add_argument("--single", type=int, default=20, help="patches timed one at a time; the time is multiplied")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=float, default=1.0, help="times the networks' channels, for a quick look")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    chosen = [words.split(",") for words in (options.networks, options.runtimes)]
    for words, known in zip(chosen, (NETWORKS, RUNTIMES), strict=True):
        if unknown := [word for word in words if word not in known]:
            parser.error(f"{unknown[0]!r}; choose of {', '.join(known)}")
    settings = {key: getattr(options, key) for key in ("data", "batch", "single", "rounds", "width", "threads")}
    rows = []
    for name in chosen[0]:
        for runtime in chosen[1]:
            row = apart(timed, name, runtime, settings)
            row["memory"] = {
                way: apart(remembered, name, runtime, way, settings)
                for way in ("one pass", "patches", "patches, all at once")
            }
            rows.append(row)
            print("\n".join(described(row)), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"side": SIDE, "rows": rows} | settings, indent=1))


def described(row: dict) -> list[str]:
    cells, dense = row["grid"][0], row["dense"][0]
    lines = [f"{row['network']}, {row['runtime']}, {SIDE}×{SIDE}: a grid of {cells}×{cells} at stride {STRIDE}"]
    for way, (middle, low, high) in row["ms"].items():
        taken = row["memory"].get(way)
        words = "" if taken is None else f", {taken / 1e6:.0f} MB"
        lines.append(f"  {way:<28} {middle:9.1f} ms ({low:.1f} to {high:.1f}){words}")
    middle, low, high = row["ratio"]
    lines.append(f"  patches over one pass: {middle:.1f} times the time ({low:.1f} to {high:.1f}; the paper: 5)")
    lines.append(f"  patches one at a time over one pass: {row['ratio_single'][0]:.1f}")
    if "ratio_dense" in row:
        middle, low, high = row["ratio_dense"]
        lines.append(f"  at stride {DENSE}, {dense}×{dense}: {middle:.0f} times the time ({low:.0f} to {high:.0f})")
    one = max(row["memory"]["one pass"], 1)
    for way in ("patches", "patches, all at once"):
        lines.append(f"  memory, {way} over one pass: {row['memory'][way] / one:.1f}")
    lines.append(f"  difference at {WINDOW}×{WINDOW}, of the scores' range: {row['at_224']:.1e}")
    if "at_field" in row:
        lines.append(f"  difference from patches of the whole receptive field: {row['at_field']:.1e}")
    lines.append(
        f"  windows of {WINDOW}×{WINDOW}, which see less: correlation {row['windows_correlation']:.3f}, "
        f"the same best class in {row['windows_top1']:.0%}"
    )
    return lines


if __name__ == "__main__":
    main()
