"""What a user would pick instead of ours, each in its own words: how it is prepared, loaded and called."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fcn_deploy.calibration.datasets import load_dataset
from fcn_deploy.calibration.metrics import Metrics, confusion_matrix
from fcn_deploy.runtime.engine_format.model_card import CARD_KEY
from fcn_deploy.runtime.errors import one_line
from PIL import Image

from benchmarks.common import fitted, photographs
from fcn_deploy import ModelCard

HISTOGRAM_IMAGES = 16  # quantize_static keeps every activation of these in memory
Call = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Job:
    """What every candidate is given.

    Attributes:
        checkpoint, model: the network, for PyTorch and as ONNX.
        data: labelled images, as of eval-fcn.
        work: folder of what is prepared: calibration images, quantized models, engines.
        sizes: (height, width) of the mixed stream.
        fixed: that of the image of one size.
        threads: of one call.
        count: images of val to measure mIoU on; None: all.
        calibration: photographs for INT8.
    """

    checkpoint: str
    model: str
    data: str
    work: str
    sizes: tuple[tuple[int, int], ...]
    fixed: tuple[int, int]
    threads: int
    count: int | None
    calibration: int

    def file(self, name: str) -> Path:
        return Path(self.work) / name

    def card(self) -> ModelCard:
        import onnx
        from fcn_deploy.export.graph.edit import metadata

        return ModelCard.from_json(metadata(onnx.load(self.model), CARD_KEY), self.model)

    def images(self) -> tuple[list[np.ndarray], np.ndarray]:
        """The mixed stream and the image of fixed size, the same in every process."""
        stream = photographs(self.data)
        order = np.random.default_rng(1).permutation(len(stream))
        sizes = [*self.sizes, self.fixed]
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
    from fcn_deploy.fcn.checkpoint import load_checkpoint

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
    from fcn_deploy import Segmenter

    return Segmenter(job.file(name), threads=job.threads)


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
    from fcn_deploy.export.passes.fold_decision import fold_decision

    onnx.save(fold_decision(onnx.load(job.file(name) if name else job.model), job.card()).model, out)


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
            print(f"quantize_static, {method.name}: {one_line(error, 120)}", file=sys.stderr)
            continue
        if found > best:
            best = found
            tried.replace(out)
    if best < 0:
        raise RuntimeError("quantize_static failed with each of its calibration methods")


def make_nncf(job: Job, out: Path) -> None:
    """NNCF's post-training quantization in its stock settings."""
    import nncf
    import openvino as ov

    before, images = normalised(job.card()), job.calibration_images()
    model = ov.Core().read_model(job.model)
    quantized = nncf.quantize(model, nncf.Dataset(images, before), subset_size=len(images))
    ov.save_model(quantized, out, compress_to_fp16=False)


def make_engine(job: Job, out: Path, precision: str) -> None:
    """build-engine, for the sizes that will come."""
    sizes = ",".join(f"{height}x{width}" for height, width in (*job.sizes, job.fixed))
    words = [job.model, "-o", str(out), "--target", "cpu", "--threads", str(job.threads), "--sizes", sizes]
    if precision != "float32":
        folder = job.file("calibration")
        words += [f"--{precision}", "--calib", str(folder / "images"), "--labels", str(folder / "labels")]
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
    "float32.engine": (make_engine, {"precision": "float32"}),
    "bf16.engine": (make_engine, {"precision": "bf16"}),
    "int8.engine": (make_engine, {"precision": "int8"}),
}


@dataclass(frozen=True)
class Candidate:
    """One row of the table.

    Attributes:
        kind: `pytorch`, `float32`, `own` (a precision of the library's choice), `int8`, `ours`, `ours-bf16` or
            `ours-int8`.
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
    "ours-bf16": Candidate(
        "fcn-deploy BF16", "ours-bf16", load_ours, {"name": "bf16.engine"}, ("calibration", "bf16.engine")
    ),
    "ours-int8": Candidate(
        "fcn-deploy INT8", "ours-int8", load_ours, {"name": "int8.engine"}, ("calibration", "int8.engine")
    ),
}
