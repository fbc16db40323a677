"""INT8 against onnxruntime's own quantize_static, on the same calibration images and the same network; and FP8.

    python -m benchmarks.int8 model.onnx --data ../shared/camvid [--count 60] [--ours]

quantize_static is tried in several settings (u8·s8 with reduced range, per channel, QDQ; ranges by min-max, entropy
and percentile), on the core network as ours is, with images resized to one size, since its calibrators fail on
others. Scores become labels by the same exact upsampling. The TensorRT flavour is s8·s8 symmetric, run as written; so
are FP8, and what is FP16 or BF16, rounded after each operator. No layer goes back to higher precision.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from fcn_deploy.calibration.datasets import load_dataset
from fcn_deploy.calibration.metrics import Metrics, confusion_matrix
from fcn_deploy.calibration.stream import divide, open_stream
from fcn_deploy.export.build.core import core_of, optimise_offline
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.quantization.mixed_precision import mix_precision
from fcn_deploy.export.quantization.options import QuantizationOptions
from fcn_deploy.runtime.pixels.prepare import prepare
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from PIL import Image

from benchmarks.common import graph_labels

# Title → target's scheme, and what is asked for.
OURS = {
    "cpu": ("cpu", {"int8": True}), "tensorrt": ("tensorrt", {"int8": True}),
    "tensorrt FP8 and FP16": ("tensorrt", {"fp8": True, "fp16": True}), "tensorrt FP8": ("tensorrt", {"fp8": True}),
    "tensorrt FP16": ("tensorrt", {"fp16": True}), "tensorrt BF16": ("tensorrt", {"bf16": True}),
}  # fmt: skip


class Reader(CalibrationDataReader):
    """Core inputs, one at a time."""

    def __init__(self, inputs) -> None:
        self.inputs = iter(inputs)

    def get_next(self):
        x = next(self.inputs, None)
        return None if x is None else {"image": x}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--count", type=int, default=60, help="calibration images")
    parser.add_argument("--ours", action="store_true", help="without quantize_static")
    parser.add_argument("--judge", type=int, default=None, help="validation images; default: all")
    options = parser.parse_args()
    found = core_of(import_model(options.model))
    head, card, core = found.upsampling, found.card, optimise_offline(found.model)
    validation = load_dataset(options.data, "val", count=options.judge, card=card)
    pairs = [validation[index] for index in range(len(validation))]
    images, _ = divide(open_stream(options.data, card), options.count, 1)
    calibration = [image for _, image in images]
    side = max(card.size_multiple, 256)
    resized = [np.asarray(Image.fromarray(image).resize((side * 3 // 2, side))) for image in calibration]

    def miou(model: onnx.ModelProto | bytes, optimise: bool) -> float:
        predict, classes = graph_labels(model, head, card, optimise), len(card.classes)
        confusion = np.zeros((classes, classes), np.int64)
        for image, labels in pairs:
            confusion += confusion_matrix(labels, predict(image), classes)
        return Metrics.of(confusion).mean_iou

    baseline = miou(core, True)
    print(f"{options.model}: float32 mIoU {baseline:.4f} on {len(pairs)} images; {len(calibration)} to calibrate on\n")
    print(f"{'low precision by':<52} {'mIoU':>7} {'lost':>6}  {'seconds':>7}")

    def row(name: str, value: float, seconds: float) -> None:
        print(f"{name:<52} {value:7.4f} {(baseline - value) * 100:6.2f}  {seconds:7.1f}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for title, (target, words) in OURS.items():
            started = time.perf_counter()
            if words.get("int8") or words.get("fp8"):
                words = {**words, "ranges": Path(folder) / "ranges.json"}
            how = QuantizationOptions(
                calib=options.data, count=options.count, max_drop=100, max_class_drop=100, **words
            )
            result = mix_precision(core, head, card, target, how)
            spent = time.perf_counter() - started
            row(f"fcn-deploy, {title}", miou(result.emulated, optimise=target == "cpu"), spent)
        if options.ours:
            return
        source, out = Path(folder) / "core.onnx", Path(folder) / "int8.onnx"
        onnx.save(core, source)
        for target in ("cpu", "tensorrt"):
            symmetric = target == "tensorrt"
            extra = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False} if symmetric else {}
            for method in (CalibrationMethod.MinMax, CalibrationMethod.Entropy, CalibrationMethod.Percentile):
                started = time.perf_counter()
                try:
                    quantize_static(
                        source,
                        out,
                        Reader(prepare(image, card) for image in resized),
                        quant_format=QuantFormat.QDQ,
                        per_channel=True,
                        reduce_range=not symmetric,
                        activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
                        weight_type=QuantType.QInt8,
                        calibrate_method=method,
                        extra_options=extra,
                    )
                except Exception as error:
                    print(f"quantize_static, {target}, {method.name}: failed: {type(error).__name__}")
                    continue
                spent = time.perf_counter() - started
                row(f"quantize_static, {target}, {method.name}", miou(out.read_bytes(), not symmetric), spent)


if __name__ == "__main__":
    main()
