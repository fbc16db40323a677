"""INT8 engines on this CPU, and on one without VNNI, which it is made to be: CPUID answers for AVX2 alone
(`without_vnni.c`).
"""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fcn_deploy.export.graph.edit import attributes, initializers
from fcn_deploy.export.passes.raw_input import raw_input
from fcn_deploy.export.passes.space_to_depth import space_to_depth
from fcn_deploy.export.quantization.quantize import SCHEMES, measured_tensors, quantize
from fcn_deploy.runtime.backends.onnxruntime import OnnxRuntimeSession
from fcn_deploy.runtime.pixels.prepare import prepare
from helpers import onnx_model
from onnx import helper

from fcn_deploy import ModelCard

CANNOT = 77  # of without_vnni.c: nothing is hidden here
RUN = """
import sys, numpy
from numpy._core._multiarray_umath import __cpu_features__ as features
from fcn_deploy.runtime.backends.onnxruntime import OnnxRuntimeSession
from fcn_deploy.runtime.backends.openvino import OpenVinoSession
given, found = numpy.load(sys.argv[1]), {"vnni": features["AVX512VNNI"]}
for name in given.files:
    if name.endswith("model"):
        for kind in (OnnxRuntimeSession, OpenVinoSession):
            run = kind(given[name].tobytes(), threads=1)
            found[f"{name} {run.name}"] = run.run(given[name.replace("model", "image")])
numpy.savez(sys.argv[2], **found)
"""
RANDOM = np.random.default_rng(3)
CARD = ModelCard(("a", "b"), mean=(100, 120, 140), size_multiple=2)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """What hides VNNI from the process that loads it."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux" or os.uname().machine != "x86_64":
        pytest.skip("needs Linux on x86-64 and a C compiler")
    path = tmp_path_factory.mktemp("cpu") / "without_vnni.so"
    source = Path(__file__).parents[2] / "without_vnni.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", path, source], check=True)
    if subprocess.run(["true"], env={"LD_PRELOAD": str(path)}, check=False).returncode == CANNOT:
        pytest.skip("CPUID cannot be answered otherwise on this machine")
    return path


def core():
    """Dense layers of large weights on bright pixels: pairs of products far beyond 16 bits."""
    weights = {
        "w0": RANDOM.normal(size=(16, 3, 3, 3)),
        "w1": RANDOM.choice([-1.0, 1.0], size=(16, 16, 3, 3)) * RANDOM.uniform(0.9, 1, size=(16, 16, 3, 3)),
        "w2": RANDOM.normal(size=(16, 1, 3, 3)),
        "w3": RANDOM.normal(size=(2, 16, 1, 1)),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w0"], ["c0"], strides=[2, 2], pads=[0, 0, 1, 1]),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("Conv", ["r0", "w1"], ["c1"], pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], pads=[1] * 4, group=16),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("Conv", ["r2", "w3"], ["scores"]),
    ]
    return onnx_model(nodes, {name: np.float32(value) for name, value in weights.items()}, gives=("N", 2, "h", "w"))


def in_integers(model, image):
    """The scores of an INT8 graph for CPUs as integer arithmetic has them: exact sums, each rounded once."""
    known, found = initializers(model), {"image": (image, None)}
    for node in model.graph.node:
        given = attributes(node)
        values, scale = found[node.input[0]] if node.input[0] in found else (known[node.input[0]], None)
        if node.op_type == "DequantizeLinear":
            values, scale = values.astype(np.int64) - known[node.input[2]].astype(np.int64).max(), known[node.input[1]]
        elif node.op_type == "Transpose":
            values = values.transpose(given["perm"])
        elif node.op_type == "Conv":
            (weight, by), bias = found[node.input[1]], found.get(node.input[2], (known.get(node.input[2]), None))[0]
            values = convolved(values, weight, given) + bias.reshape(1, -1, 1, 1).astype(np.int64)
            scale = np.float32(scale) * by.reshape(1, -1, 1, 1)
        elif node.op_type == "Relu":
            values = np.maximum(values, 0)
        elif node.op_type == "QuantizeLinear":
            rounded = np.rint(values.astype(np.float32) * (scale / known[node.input[1]])) + known[node.input[2]]
            values, scale = np.clip(rounded, 0, 255).astype(np.uint8), None
        else:
            assert node.op_type == "Mul"
            values = values.astype(np.float32) * known[node.input[1]]
        found[node.output[0]] = values, scale
    return values


def convolved(values, weight, given):
    top, left, bottom, right = given.get("pads", [0] * 4)
    step, groups = given.get("strides", [1, 1])[0], given.get("group", 1)
    windows = np.pad(values, ((0, 0), (0, 0), (top, bottom), (left, right)))
    windows = np.lib.stride_tricks.sliding_window_view(windows, weight.shape[2:], (2, 3))[:, :, ::step, ::step]
    parts = zip(np.split(windows, groups, 1), np.split(weight, groups), strict=True)
    return np.concatenate([np.einsum("nchwyx,kcyx->nkhw", *pair) for pair in parts], 1)


def graphs_and_images():
    """INT8 graphs on pixels and on squares of them, and what is run beside them: name → (graph, image)."""
    made = core()
    ranges = dict.fromkeys(measured_tensors(made), (-60.0, 60.0)) | dict.fromkeys(("r0", "r1", "r2"), (0.0, 3.0))
    image = RANDOM.integers(180, 256, (33, 46, 3), np.uint8)
    pixels = raw_input(quantize(made, ranges, SCHEMES["cpu"]), made, CARD)
    squares = space_to_depth(pixels.model, pixels.border)
    saturating = quantize(made, ranges, replace(SCHEMES["cpu"], pairs=False))
    return {
        "pixels": (pixels.model, prepare(image, CARD, border=pixels.border)),
        "squares": (squares.model, prepare(image, CARD, border=squares.border, block=squares.block)),
        "saturating": (saturating, prepare(image, CARD)),
    }


def test_int8_scores_are_those_of_integer_arithmetic_bit_for_bit():
    given = graphs_and_images()
    for name in ("pixels", "squares"):  # OpenVINO rounds otherwise
        model, image = given[name]
        scores = OnnxRuntimeSession(model.SerializeToString(), threads=1).run(image)
        np.testing.assert_array_equal(scores, in_integers(model, image))
        assert np.unique(scores).size > 500


def test_int8_scores_without_vnni_are_those_with_it_bit_for_bit(library, tmp_path):
    given = {}
    for name, (model, image) in graphs_and_images().items():
        given |= {f"{name} image": image, f"{name} model": np.frombuffer(model.SerializeToString(), np.uint8)}
    np.savez(tmp_path / "given.npz", **given)
    found = []
    for preloaded in ({}, {"LD_PRELOAD": str(library)}):
        out = tmp_path / f"{len(found)}.npz"
        command = [sys.executable, "-c", RUN, tmp_path / "given.npz", out]
        subprocess.run(command, check=True, env={**os.environ, **preloaded})
        found.append(np.load(out))
    here, there = found
    assert not there["vnni"]
    if not here["vnni"]:
        pytest.skip("this CPU has no VNNI: both runs were without it")
    for backend in ("onnxruntime", "openvino"):
        for name in ("pixels", "squares"):
            np.testing.assert_array_equal(here[f"{name} model {backend}"], there[f"{name} model {backend}"])
    # Weights that are not held in pairs saturate there, which shows that other kernels run.
    name = "saturating model onnxruntime"
    assert np.abs(here[name] - there[name]).max() > 0.1 * np.ptp(here[name])
