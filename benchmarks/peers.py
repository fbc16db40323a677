"""Ours against what a user would pick instead: one table and one plot.

    python -m benchmarks.peers cam.safetensors cam.onnx --data ../shared/camvid --plot peers.png [--json peers.json]

Every candidate takes a uint8 [H, W, 3] array and gives a uint8 [H, W] label map, and is told the same number of
threads. Mixed: 24 seeded sizes from 97×61 to 1500×1125, one image after the other; fixed: 512×1024.

Each candidate is a process of its own, in its own stock settings, and only one works at a time: the others wait at
a pipe. In one process they would have to share settings that a user leaves alone (ONNX Runtime's and OpenMP's
threads spin between calls, and slow whatever runs beside them), and their allocators would meet. That an idle
candidate uses no processor is checked before the first round: the largest share is printed.

In every round every candidate that takes part runs every image once, candidates and images in random order, after one
run that is not timed. Ratios are taken within a round, from the sum over the images, so that a change of the machine's
speed hits both sides; what is shown is their median and the 10 % to 90 % range over rounds. PyTorch takes part in
a third of the rounds (at least three), being slow. mIoU is measured through the very call that is timed, on the data's
val split at its own sizes. INT8 candidates are given the same photographs of the train split; ours sets a fifth of them
apart for its accuracy gate.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common import fitted, mixed_sizes, photographs, pyplot, spread
from calibration.datasets import load_dataset
from calibration.metrics import Metrics, confusion_matrix
from runtime import ModelCard
from runtime.engine_file import CARD_KEY

LEAST, MOST, FIXED = (97, 61), (1500, 1125), (512, 1024)
FIXED_RUNS = 4  # of the fixed size, a round
HISTOGRAM_IMAGES = 16  # quantize_static keeps every activation of these in memory
Call = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Job:
    """What every candidate is given.

    Attributes:
        checkpoint, model: the network, for PyTorch and as ONNX.
        data: labelled images, as of eval-fcn.
        work: folder of what is prepared: calibration images, quantised models, engines.
        sizes: (height, width) of the mixed stream.
        threads: of one call.
        count: images of val to measure mIoU on; None: all.
        calibration: photographs for INT8.
    """

    checkpoint: str
    model: str
    data: str
    work: str
    sizes: tuple[tuple[int, int], ...]
    threads: int
    count: int | None
    calibration: int

    def file(self, name: str) -> Path:
        return Path(self.work) / name

    def card(self) -> ModelCard:
        import onnx

        from export.graph import metadata

        return ModelCard.from_json(metadata(onnx.load(self.model), CARD_KEY), self.model)

    def images(self) -> tuple[list[np.ndarray], np.ndarray]:
        """The mixed stream and the image of fixed size, the same in every process."""
        stream = photographs(self.data)
        order = np.random.default_rng(1).permutation(len(stream))
        sizes = [*self.sizes, FIXED]
        images = [fitted(stream.read(int(order[i % len(order)])), *size) for i, size in enumerate(sizes)]
        return images[:-1], images[-1]

    def calibration_images(self) -> list[np.ndarray]:
        files = sorted((self.file("calibration") / "images").glob("*.png"))
        return [np.asarray(Image.open(file)) for file in files]


# The candidates: each `load_…` gives a function from image to labels, in the words a user would write.


def normalised(card: ModelCard) -> Call:
    """NumPy before the network, as a user would write it: uint8 [H, W, 3] → float32 [1, 3, H, W]."""
    mean, std = np.array(card.mean, np.float32), np.array(card.std, np.float32)
    return lambda image: ((image.astype(np.float32) - mean) / std).transpose(2, 0, 1)[None]


def labelled(output: np.ndarray) -> np.ndarray:
    """NumPy after it: logits [1, K, H, W], or labels [1, H, W], → uint8 [H, W]."""
    return output[0] if output.ndim == 3 else output[0].argmax(0).astype(np.uint8)


def load_torch(job: Job, channels_last: bool = False, compiled: bool | None = None) -> Call:
    """PyTorch in inference mode; `compiled`: by torch.compile, frozen, for sizes that are dynamic (True) or static."""
    import torch

    from fcn.checkpoint import load_checkpoint

    torch.set_num_threads(job.threads)
    checkpoint = load_checkpoint(job.checkpoint)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = checkpoint.model.eval().to(memory_format=layout)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (checkpoint.card.mean, checkpoint.card.std))

    def network(image: torch.Tensor) -> torch.Tensor:
        x = ((image.permute(2, 0, 1)[None] - mean) / std).contiguous(memory_format=layout)
        return model(x)[0].argmax(0).to(torch.uint8)

    if compiled is not None:
        import torch._dynamo.config
        import torch._inductor.config

        torch._inductor.config.freezing = True
        torch._dynamo.config.recompile_limit = 64
        network = torch.compile(network, dynamic=compiled)
    # Freezing wants no_grad: it does not fold parameters in inference mode.
    mode = torch.inference_mode if compiled is None else torch.no_grad

    def call(image: np.ndarray) -> np.ndarray:
        with mode():
            return network(torch.from_numpy(image)).numpy()

    return call


def load_ort(job: Job, name: str | None = None) -> Call:
    """ONNX Runtime in its stock settings, but for the number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.log_severity_level = 3
    path = job.file(name) if name else job.model
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    before = normalised(job.card())
    return lambda image: labelled(session.run(None, {"image": before(image)})[0])


def load_openvino(job: Job, name: str | None = None, in_graph: bool = False, float32: bool = False) -> Call:
    """OpenVINO in its stock settings; `in_graph`: input by PrePostProcessor, argmax added to the model.

    `float32` holds it to that: of itself it runs float32 models in bfloat16 where the processor has it.
    """
    import openvino as ov

    card, core = job.card(), ov.Core()
    model = core.read_model(job.file(name) if name else job.model)
    if in_graph:
        ops = ov.opset13
        logits = model.get_results()[0].input(0).get_source_output()
        best = ops.topk(logits, np.int64(1), 1, "max", "none", index_element_type="i32").output(1)
        labels = ops.convert(ops.squeeze(best, np.array([1], np.int64)), "u8")
        steps = ov.preprocess.PrePostProcessor(ov.Model([labels], model.get_parameters()))
        image = steps.input()
        image.tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
        image.model().set_layout(ov.Layout("NCHW"))
        prepare = image.preprocess().convert_element_type(ov.Type.f32)
        prepare.mean([float(value) for value in card.mean]).scale([float(value) for value in card.std])
        model = steps.build()
    settings = {"INFERENCE_NUM_THREADS": job.threads, "PERFORMANCE_HINT": "LATENCY"}
    settings |= {"INFERENCE_PRECISION_HINT": "f32"} if float32 else {}
    compiled = core.compile_model(model, "CPU", settings)
    before = (lambda image: image[None]) if in_graph else normalised(card)
    return lambda image: labelled(compiled(before(image))[0])


def load_ours(job: Job, name: str) -> Call:
    from runtime import Segmenter

    return Segmenter(job.file(name), threads=job.threads)


# What is prepared beforehand, each file once; in processes of their own, whose memory counts for no candidate.


def make_calibration(job: Job, out: Path) -> None:
    """Photographs of the train split and their labels, as files."""
    data = load_dataset(job.data, "train", count=job.calibration, card=job.card())
    for kind in ("images", "labels"):
        (out / kind).mkdir(parents=True)
    for index in range(len(data)):
        for kind, array in zip(("images", "labels"), data[index], strict=True):
            Image.fromarray(array).save(out / kind / f"{index:04}.png", compress_level=1)


def make_argmax(job: Job, out: Path, name: str | None = None) -> None:
    """The model with argmax in its graph."""
    import onnx

    from export.passes.fold_head import fold_head

    onnx.save(fold_head(onnx.load(job.file(name) if name else job.model), job.card()), out)


def make_ort_int8(job: Job, out: Path, symmetric: bool) -> None:
    """quantize_static, QDQ, per channel; of min-max, entropy and percentile what labels the calibration images best.

    `symmetric`: s8·s8, its default; else u8·s8, which its documentation recommends for x86, with reduced range
    where the processor has no VNNI.
    """
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self, count: int) -> None:
            self.inputs = iter(images[:count])

        def get_next(self):
            image = next(self.inputs, None)
            return None if image is None else {"image": before(image)}

    before, images = normalised(job.card()), job.calibration_images()
    source = out.with_suffix(".source.onnx")
    quant_pre_process(job.model, source, skip_symbolic_shape=True)
    best, tried = -1.0, out.with_suffix(".tried.onnx")
    kinds = {} if symmetric else {"activation_type": QuantType.QUInt8, "reduce_range": not has_vnni()}
    for method in (CalibrationMethod.MinMax, CalibrationMethod.Entropy, CalibrationMethod.Percentile):
        count = len(images) if method is CalibrationMethod.MinMax else HISTOGRAM_IMAGES
        try:
            quantize_static(source, tried, Reader(count), per_channel=True, calibrate_method=method, **kinds)
            classes = len(job.card().classes)
            found = accuracy(load_ort(job, tried.name), calibration_pairs(job)[:HISTOGRAM_IMAGES], classes)
        except Exception as error:  # its calibrators fail on images of different sizes
            print(f"quantize_static, {method.name}: {' '.join(str(error).split())[:120]}", file=sys.stderr)
            continue
        if found > best:
            best = found
            tried.replace(out)
    if best < 0:
        raise RuntimeError("quantize_static failed with each of its calibration methods")


def make_nncf(job: Job, out: Path) -> None:
    """NNCF's post-training quantisation in its stock settings."""
    import nncf
    import openvino as ov

    before, images = normalised(job.card()), job.calibration_images()
    model = ov.Core().read_model(job.model)
    quantised = nncf.quantize(model, nncf.Dataset(images, before), subset_size=len(images))
    ov.save_model(quantised, out, compress_to_fp16=False)


def make_engine(job: Job, out: Path, int8: bool) -> None:
    """build-engine, for the sizes that will come."""
    sizes = ",".join(f"{height}x{width}" for height, width in (*job.sizes, FIXED))
    words = [job.model, "-o", str(out), "--target", "cpu", "--threads", str(job.threads), "--sizes", sizes]
    if int8:
        folder = job.file("calibration")
        words += ["--int8", "--calib", str(folder / "images"), "--labels", str(folder / "labels")]
        words += ["--calib-count", str(job.calibration)]
    program = Path(sys.executable).parent / "build-engine"
    done = subprocess.run([program, *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])


MADE: dict[str, tuple[Callable, dict[str, Any]]] = {
    "calibration": (make_calibration, {}),
    "argmax.onnx": (make_argmax, {}),
    "ort-s8.onnx": (make_ort_int8, {"symmetric": True}),
    "ort-u8.onnx": (make_ort_int8, {"symmetric": False}),
    "ort-u8-argmax.onnx": (make_argmax, {"name": "ort-u8.onnx"}),
    "nncf.xml": (make_nncf, {}),
    "float32.engine": (make_engine, {"int8": False}),
    "int8.engine": (make_engine, {"int8": True}),
}


@dataclass(frozen=True)
class Candidate:
    """One row of the table.

    Attributes:
        kind: `pytorch`, `float32`, `own` (a precision of the library's choice), `int8`, `ours` or `ours-int8`.
        load: Job → the call.
        needs: what is prepared beforehand, keys of MADE.
        fixed_only: it takes no part in the mixed stream.
    """

    name: str
    kind: str
    load: Callable[..., Call]
    arguments: dict[str, Any]
    needs: tuple[str, ...] = ()
    fixed_only: bool = False


CANDIDATES = {
    "torch": Candidate("PyTorch eager", "pytorch", load_torch, {}),
    "torch-cl": Candidate("PyTorch eager, channels-last", "pytorch", load_torch, {"channels_last": True}),
    "compile": Candidate(
        "torch.compile, frozen, dynamic sizes", "pytorch", load_torch, {"channels_last": True, "compiled": True}
    ),
    "compile-static": Candidate(
        "torch.compile, frozen, one size",
        "pytorch",
        load_torch,
        {"channels_last": True, "compiled": False},
        fixed_only=True,
    ),
    "ort": Candidate("ONNX Runtime float32", "float32", load_ort, {}),
    "ort-argmax": Candidate(
        "ONNX Runtime float32, argmax in graph", "float32", load_ort, {"name": "argmax.onnx"}, ("argmax.onnx",)
    ),
    "openvino": Candidate("OpenVINO float32", "float32", load_openvino, {"float32": True}),
    "openvino-graph": Candidate(
        "OpenVINO float32, input and argmax in graph", "float32", load_openvino, {"in_graph": True, "float32": True}
    ),
    "openvino-own": Candidate(
        "OpenVINO, precision of its choice, input and argmax in graph", "own", load_openvino, {"in_graph": True}
    ),
    "ort-s8": Candidate(
        "ONNX Runtime INT8, quantize_static s8·s8",
        "int8",
        load_ort,
        {"name": "ort-s8.onnx"},
        ("calibration", "ort-s8.onnx"),
    ),
    "ort-u8": Candidate(
        "ONNX Runtime INT8, quantize_static u8·s8",
        "int8",
        load_ort,
        {"name": "ort-u8.onnx"},
        ("calibration", "ort-u8.onnx"),
    ),
    "ort-u8-argmax": Candidate(
        "ONNX Runtime INT8, u8·s8, argmax in graph",
        "int8",
        load_ort,
        {"name": "ort-u8-argmax.onnx"},
        ("calibration", "ort-u8.onnx", "ort-u8-argmax.onnx"),
    ),
    "nncf": Candidate("OpenVINO INT8, NNCF", "int8", load_openvino, {"name": "nncf.xml"}, ("calibration", "nncf.xml")),
    "nncf-graph": Candidate(
        "OpenVINO INT8, NNCF, input and argmax in graph",
        "int8",
        load_openvino,
        {"name": "nncf.xml", "in_graph": True},
        ("calibration", "nncf.xml"),
    ),
    "ours": Candidate("fcn-deploy float32", "ours", load_ours, {"name": "float32.engine"}, ("float32.engine",)),
    "ours-int8": Candidate(
        "fcn-deploy INT8", "ours-int8", load_ours, {"name": "int8.engine"}, ("calibration", "int8.engine")
    ),
}


def fingerprint(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def has_vnni() -> bool:
    file = Path("/proc/cpuinfo")
    return file.exists() and "vnni" in file.read_text()


def calibration_pairs(job: Job) -> list[tuple[np.ndarray, np.ndarray]]:
    folder = job.file("calibration")
    files = sorted((folder / "images").glob("*.png"))
    return [tuple(np.asarray(Image.open(folder / kind / f.name)) for kind in ("images", "labels")) for f in files]


def accuracy(call: Call, pairs, classes: int) -> float:
    """mIoU of a candidate's labels on (image, labels) pairs."""
    # A copy: PyTorch wants arrays that it could write to.
    confusion = sum(confusion_matrix(labels, call(image.copy()), classes) for image, labels in pairs)
    return Metrics.of(confusion).mean_iou


# One process a candidate.


def serve(key: str, job: Job, pipe) -> None:
    """Load a candidate, say what it is like, then answer orders of image numbers with milliseconds, until None."""
    try:
        started = time.perf_counter()
        candidate = CANDIDATES[key]
        call = candidate.load(job, **candidate.arguments)
        mixed, fixed = job.images()
        mixed = [] if candidate.fixed_only else mixed
        loaded = time.perf_counter()
        labels = [call(image) for image in (*mixed, fixed)]
        about = {"load_s": loaded - started, "first_s": time.perf_counter() - loaded}
        for image, found in zip((*mixed, fixed), labels, strict=True):
            if found.shape != image.shape[:2] or found.dtype != np.uint8:
                raise RuntimeError(f"{found.dtype} labels of {found.shape} for an image of {image.shape}")
        data = load_dataset(job.data, "val", count=job.count, card=job.card())
        about["miou"] = accuracy(call, (data[index] for index in range(len(data))), len(job.card().classes))
        time.sleep(0.2)
        used = time.process_time()
        time.sleep(0.5)
        about["idle"] = (time.process_time() - used) / 0.5
        about["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        pipe.send(about | {"labels": labels})
        while (order := pipe.recv()) is not None:
            pipe.send({"mixed": timed(call, mixed, order), "fixed": timed(call, [fixed], [0] * FIXED_RUNS)})
    except EOFError:
        pass  # whoever asked has gone
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


def timed(call: Call, images: list[np.ndarray], order: list[int]) -> list[float]:
    """Milliseconds of each image, by its number; one more run before them is not counted."""
    if not images:
        return []
    call(images[order[0]])
    times: list[list[float]] = [[] for _ in images]
    for index in order:
        started = time.perf_counter()
        call(images[index])
        times[index].append((time.perf_counter() - started) * 1e3)
    return [float(np.median(values)) for values in times]


class Worker:
    """A process of this machine's own that runs `target(*arguments, pipe)`."""

    def __init__(self, target: Callable, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(*arguments, theirs))
        self.process.start()
        theirs.close()

    def ask(self, question: Any = None) -> None:
        self.pipe.send(question)

    def answer(self, limit: float) -> dict[str, Any]:
        """What it sends next, or {"error"} where it ends or takes longer than `limit` seconds."""
        try:
            if self.pipe.poll(limit):
                return self.pipe.recv()
            said = f"took over {limit:.0f} s, and was stopped"
        except (EOFError, OSError):
            self.process.join(10)
            said = f"its process ended with {self.process.exitcode}"
        self.process.kill()
        return {"error": said}

    def close(self) -> None:
        self.pipe.close()
        self.process.join(10)
        self.process.kill()


def made(name: str, job: Job, pipe) -> None:
    """Prepare one file of MADE; what libraries print meanwhile goes to a .log beside it."""
    function, arguments = MADE[name]
    with job.file(f"{name}.log").open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    started = time.perf_counter()
    try:
        function(job, job.file(name), **arguments)
        pipe.send({"seconds": time.perf_counter() - started})
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="what PyTorch runs")
    parser.add_argument("model", type=Path, help="what export-onnx made of it")
    parser.add_argument("--data", required=True, help="labelled images with the splits train and val")
    parser.add_argument("--only", default=",".join(CANDIDATES), help="candidates, comma-separated [default: all]")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", type=int, default=24, help="in the mixed stream")
    parser.add_argument("--seed", type=int, default=0, help="of the sizes and of the order")
    parser.add_argument("--count", type=int, help="images of val to measure mIoU on [default: all]")
    parser.add_argument("--calibration", type=int, default=100, help="photographs for INT8")
    parser.add_argument("--limit", type=float, default=1800, help="seconds a candidate may take to get ready")
    parser.add_argument("--work", type=Path, help="folder to keep what is prepared in, and to find it [default: none]")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    keys = options.only.split(",")
    if unknown := [key for key in keys if key not in CANDIDATES]:
        parser.error(f"--only {unknown[0]} is none of {', '.join(CANDIDATES)}")
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        sizes = tuple(mixed_sizes(options.sizes, LEAST, MOST, options.seed))
        paths = (str(options.checkpoint), str(options.model), options.data, str(work))
        job = Job(*paths, sizes, options.threads, options.count, options.calibration)
        made_for = json.dumps([fingerprint(options.model), options.data, sizes, options.threads, options.calibration])
        if job.file("job.json").exists() and job.file("job.json").read_text() != made_for:
            parser.error(f"--work {work} holds what was prepared for another model, data or settings; name another")
        job.file("job.json").write_text(made_for)
        result = compare(job, keys, options.rounds, options.seed, options.limit)
    print(f"{result['machine']}; {options.threads} threads; {options.rounds} rounds; {options.model}")
    print(f"largest share of a processor that a waiting candidate used: {result['idle']:.2f}\n")
    print(table(result))
    print()
    print("\n".join(verdicts(result)))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    if options.plot:
        plot(result, options.plot)


def compare(job: Job, keys: list[str], rounds: int, seed: int, limit: float) -> dict[str, Any]:
    """Prepare, check and time the candidates: what --json writes."""
    rows = {key: {"name": CANDIDATES[key].name, "kind": CANDIDATES[key].kind, "error": None} for key in keys}
    prepared: dict[str, dict] = {}
    for name in dict.fromkeys(name for key in keys for name in CANDIDATES[key].needs):
        if not job.file(name).exists():
            say(f"preparing {name}")
            worker = Worker(made, name, job)
            prepared[name] = worker.answer(4 * limit)
            worker.close()
    workers, labels = {}, {}
    for key, row in rows.items():
        if failed := [name for name in CANDIDATES[key].needs if prepared.get(name, {}).get("error")]:
            row["error"] = prepared[failed[0]]["error"]
            continue
        say(f"starting {row['name']}")
        worker = Worker(serve, key, job)
        about = worker.answer(limit)
        labels[key] = about.pop("labels", [])
        row |= about
        if row["error"]:
            worker.close()
        else:
            workers[key] = worker
    # Sums over the sizes, a round each; None where a candidate had no part in it.
    times: dict[str, list[dict | None]] = {key: [] for key in workers}
    random = np.random.default_rng(seed)
    try:
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            order = [int(index) for index in random.permutation(len(job.sizes))]
            turn = [list(workers)[index] for index in random.permutation(len(workers))]
            for key in turn:
                slow = CANDIDATES[key].kind == "pytorch" and number >= max(3, rounds // 3)
                if not slow:
                    workers[key].ask(order)
                times[key].append(None if slow else workers[key].answer(limit))
    finally:
        for worker in workers.values():
            worker.close()
    say("")
    for key in workers:
        failed = [found["error"] for found in times[key] if found and "error" in found]
        if failed:
            rows[key]["error"] = failed[0]
    good = [key for key in workers if not rows[key]["error"]]
    for key in good:
        rows[key] |= figures(times, key, [other for other in ("ours", "ours-int8") if other in good])
        reference = labels.get("torch")
        if reference:
            known = list(zip(reference[-len(labels[key]) :], labels[key], strict=True))
            rows[key]["equal"] = sum(int((a == b).sum()) for a, b in known) / sum(a.size for a, _ in known)
    return {
        "machine": f"{processor()}, {os.cpu_count()} processors",
        "versions": versions(),
        "job": asdict(job),
        "fixed": FIXED,
        "rounds": rounds,
        "prepared": prepared,
        "idle": max((rows[key]["idle"] for key in good), default=0.0),
        "rows": list(rows.values()),
    }


def figures(times: dict[str, list], key: str, ours: list[str]) -> dict[str, Any]:
    """Medians of one candidate, and how many times as fast as it each of ours is, (median, 10 %, 90 %)."""
    own: dict[str, Any] = {"rounds": sum(found is not None for found in times[key]), "ratios": {}}
    for kind in ("mixed", "fixed"):
        found = [row[kind] for row in times[key] if row and row[kind]]
        own[f"{kind}_ms"] = spread([sum(row) for row in found]) if found else None
        if kind == "mixed":
            own["size_ms"] = np.median(found, axis=0).tolist() if found else None
        for other in ours:
            pairs = zip(times[key], times[other], strict=True)
            ratios = [sum(a[kind]) / sum(b[kind]) for a, b in pairs if a and b and a[kind] and b[kind]]
            own["ratios"].setdefault(other, {})[kind] = spread(ratios) if ratios else None
    return own


def say(text: str) -> None:
    """Progress, on a terminal alone."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'} ({'VNNI' if has_vnni() else 'no VNNI'})"


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "onnxruntime", "openvino", "nncf", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def table(result: dict[str, Any]) -> str:
    """Markdown. Times are medians over rounds; × is how many times as fast ours is (10 % to 90 % of the rounds)."""

    def times(row: dict, other: str, kind: str) -> str:
        found = row["ratios"].get(other, {}).get(kind)
        return "–" if found is None or other == row["kind"] else f"{found[0]:.2f} ({found[1]:.2f}–{found[2]:.2f})"

    count = len(result["job"]["sizes"])
    height, width = result["fixed"]
    lines = [
        f"| candidate | mIoU | labels as PyTorch's | {count} mixed sizes, ms | our float32 × | our INT8 × "
        f"| {height}×{width}, ms | our float32 × | our INT8 × | first pass, s | peak, MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    failed = []
    for row in result["rows"]:
        if row["error"]:
            failed.append(f"{row['name']}: not measured ({row['error']})")
            continue
        cells = [row["name"], f"{row['miou']:.4f}", f"{row['equal']:.2%}" if "equal" in row else "–"]
        for kind in ("mixed", "fixed"):
            cells.append(f"{row[f'{kind}_ms'][0]:.1f}" if row[f"{kind}_ms"] else "–")
            cells += [times(row, other, kind) for other in ("ours", "ours-int8")]
        cells += [f"{row['first_s']:.1f}", f"{row['peak_mb']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *([""] if failed else []), *failed])


def verdicts(result: dict[str, Any]) -> list[str]:
    """Ours against stock ONNX Runtime and against the best of each kind, a line each."""
    rows = [row for row in result["rows"] if not row["error"]]
    lines = []
    for other, label in (("ours", "float32"), ("ours-int8", "INT8")):
        groups = {
            "ONNX Runtime float32, NumPy before and after": [r for r in rows if r["name"] == CANDIDATES["ort"].name],
            "the best float32 peer": [row for row in rows if row["kind"] == "float32"],
            "the best PyTorch": [row for row in rows if row["kind"] == "pytorch"],
        }
        if other == "ours-int8":
            groups["the best INT8 peer"] = [row for row in rows if row["kind"] == "int8"]
            groups["the best of all peers"] = [row for row in rows if not row["kind"].startswith("ours")]
        for name, group in groups.items():
            for kind in ("mixed", "fixed"):
                known = [(row["ratios"][other][kind], row) for row in group if row["ratios"].get(other, {}).get(kind)]
                if known:
                    ratio, row = min(known, key=lambda pair: pair[0][0])
                    which = f" ({row['name']})" if name.startswith("the best") else ""
                    lines.append(
                        f"our {label} against {name}{which}, {kind}: {ratio[0]:.2f} × ({ratio[1]:.2f}–{ratio[2]:.2f})"
                    )
    return lines


def plot(result: dict[str, Any], out: Path) -> None:
    """Time of the mixed stream by candidate, and time per megapixel against size."""
    rows = [row for row in result["rows"] if not row["error"] and row["mixed_ms"]]
    if not rows:
        return
    plt = pyplot()
    colours = {
        "pytorch": "#b0b0b0",
        "float32": "#7fa7d6",
        "own": "#8fc29a",
        "int8": "#e3b26b",
        "ours": "#1f5fa8",
        "ours-int8": "#c9631b",
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(16, 5.6), width_ratios=(1, 1.1), layout="constrained")
    ranked = sorted(rows, key=lambda row: -row["mixed_ms"][0])
    for place, row in enumerate(ranked):
        middle, low, high = row["mixed_ms"]
        left.barh(place, middle, color=colours[row["kind"]], xerr=[[middle - low], [high - middle]], ecolor="#444444")
        left.text(high, place, f"  {middle:.0f} ms · mIoU {row['miou']:.3f}", va="center", fontsize=8)
    left.set_yticks(range(len(ranked)), [row["name"] for row in ranked], fontsize=8)
    # Logarithmic: PyTorch would press the others into a corner.
    ends = [row["mixed_ms"] for row in ranked]
    left.set(xscale="log", xlim=(0.6 * min(low for _, low, _ in ends), 12 * max(high for *_, high in ends)))
    left.set_xlabel(f"ms for {len(result['job']['sizes'])} images of mixed sizes")
    pixels = np.array([height * width / 1e6 for height, width in result["job"]["sizes"]])
    order = np.argsort(pixels)
    marks = iter("osv^<>DPX*hdp8+" * 2)
    for row in rows:
        per_pixel = np.array(row["size_ms"])[order] / pixels[order]
        thick = 2.2 if row["kind"].startswith("ours") else 1
        mark = {"marker": next(marks), "markersize": 4, "linewidth": thick}
        right.plot(pixels[order], per_pixel, label=row["name"], color=colours[row["kind"]], **mark)
    right.set(xscale="log", yscale="log", xlabel="megapixels of the image", ylabel="ms per megapixel")
    right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    right.grid(alpha=0.3, which="both")
    figure.suptitle(f"{result['machine']}, {result['job']['threads']} threads", fontsize=10)
    figure.savefig(out, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
