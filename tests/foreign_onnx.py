"""Small foreign ONNX models written as text, what they should give, and what their engines give."""

import numpy as np
import onnx
import onnxruntime
import pytest
from fcn_deploy.export.build.config import BuildConfig, TuningOptions
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.importer.options import ImportOptions
from helpers import photo
from onnx import numpy_helper, parser

from fcn_deploy import DeployError, Segmenter

RANDOM = np.random.default_rng(0)


SIZES = ((1, 1), (17, 23), (37, 61), (64, 96), (101, 43))


MEAN, STD = np.float32([123.675, 116.28, 103.53]), np.float32([58.395, 57.12, 57.375])


def weight(*shape):
    """Such that scores stay small, and sigmoids do not saturate."""
    return (RANDOM.normal(size=shape) / np.prod(shape[1:]) ** 0.5).astype(np.float32)


WEIGHTS = {
    "w1": weight(6, 3, 3, 3), "w2": weight(6, 6, 3, 3), "w3": weight(4, 6, 1, 1), "wp": weight(1, 6, 1, 1),
    "w2c": weight(2, 6, 1, 1), "w4": weight(3, 3, 4, 4), "b3": np.float32([0.4, 0.1, -0.2, 0]), "bp": np.float32([0.2]),
    "i0": np.array([0]), "i1": np.array([1]), "i2": np.array([2]), "i3": np.array([3]), "i4": np.array([4]),
    "half": np.float32(0.5), "zero": np.float32(0), "one": np.float32(1), "a23": np.array([2, 3]),
    "x4": np.float32([1, 1, 4, 4]), "x2": np.float32([1, 1, 2, 2]), "m255": np.float32(255), "index1": np.array(1),
}  # fmt: skip


FEATURES = """
  c1 = Conv<strides=[2,2], pads=[1,1,1,1]>(p, w1)
  r1 = Relu(c1)
  c2 = Conv<strides=[2,2], pads=[1,1,1,1]>(r1, w2)
  r2 = Relu(c2)
"""


SCORES = FEATURES + "  s = Conv(r2, w3, b3)\n"


TO_SIZE = """
  shp = Shape(p)
  hw = Slice(shp, i2, i4)
  shs = Shape(s)
  nk = Slice(shs, i0, i2)
  sizes = Concat<axis=0>(nk, hw)
  f = Resize<mode="linear", coordinate_transformation_mode="half_pixel">(s, , , sizes)
"""


PLAIN = SCORES + TO_SIZE + "y = Identity(f)"


ONE = FEATURES + "  s = Conv(r2, wp, bp)\n" + TO_SIZE


def made(text, takes="float[N,3,H,W] p", gives="float[N,4,H,W] y", opset=18, ir=8, weights=None, unshaped=True):
    """A model from the text of its nodes, and those of WEIGHTS that it reads."""
    model = parser.parse_model(f'<ir_version: {ir}, opset_import: ["" : {opset}]>\ng ({takes}) => ({gives}) {{{text}}}')
    read = {name for node in model.graph.node for name in node.input}
    for name, value in (WEIGHTS | (weights or {})).items():
        if name in read:
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    if unshaped:  # as many exporters leave them
        for value in model.graph.output:
            value.type.tensor_type.ClearField("shape")
    return model


def ran(model, image):
    """What a model gives, by ONNX Runtime, for its own kind of input."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    data = model if isinstance(model, bytes) else model.SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, image)


def planes(image):
    return ((image - MEAN) / STD).transpose(2, 0, 1)[None]


def channels_last(image):
    return ((image - MEAN) / STD)[None]


def best(result):
    return result[0].argmax(0)


def fixed(model, *shape):
    """The model with numbers for the dimensions of its input."""
    for dim, side in zip(model.graph.input[0].type.tensor_type.shape.dim, shape, strict=True):
        dim.Clear()
        dim.dim_value = side
    return model


def check(
    tmp_path,
    model,
    labels=best,
    feed=planes,
    options=None,
    sizes=SIZES,
    output=0,
    index=None,
    backend="onnxruntime",
):
    """Build an engine, and compare its labels with those of the model at its own conventions.

    Returns (source, report, Segmenter's card and head).
    """
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    source = import_model(path, options)
    config = BuildConfig(latency_sizes=[(16, 16)], tuning=TuningOptions((backend,)))
    report = build_engine(source, tmp_path / "m.engine", config)
    assert report.agreement.wrong == 0
    name = model.graph.input[0].name
    with Segmenter(tmp_path / "m.engine") as net:
        seen = set()
        for height, width in sizes:
            image = photo(height, width)
            expected = labels(ran(model, {name: feed(image)})[output])
            got = net(image)
            assert got.shape == expected.shape == (height, width)
            assert (got == expected).mean() > 0.999, (height, width, (got == expected).mean())
            seen |= set(np.unique(got))
        assert len(seen) > 1  # otherwise nothing was compared
        return source, report, net.card, net.network.upsampling


def reads(tmp_path, model, **options):
    onnx.save(model, tmp_path / "m.onnx")
    return import_model(tmp_path / "m.onnx", ImportOptions(**options))


def refused(tmp_path, model, name="m.onnx", **options):
    path = tmp_path / name
    if isinstance(model, bytes):
        path.write_bytes(model)
    else:
        onnx.save(model, path)
    with pytest.raises(DeployError) as caught:
        import_model(path, ImportOptions(**options))
    assert "\n" not in str(caught.value) and "/".join(path.parts[-2:]) in str(caught.value)
    return str(caught.value)
