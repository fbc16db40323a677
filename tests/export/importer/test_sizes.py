"""Foreign models of one size, of multiples, and those that pad and crop by themselves."""

import numpy as np
import onnx
import pytest
from fcn_deploy.export.build.config import BuildConfig
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.importer.import_model import import_model
from foreign_onnx import (
    PLAIN,
    RANDOM,
    SCORES,
    SIZES,
    TO_SIZE,
    best,
    check,
    fixed,
    made,
    planes,
    ran,
    reads,
    refused,
    weight,
)
from helpers import photo
from onnx import TensorProto

from fcn_deploy import DeployError, Segmenter

FIXED = {
    "by name alone": (PLAIN, best, (1, 3, 64, 96), {}),
    "labels, channels last, of two images": (
        "  p = Transpose<perm=[0,3,1,2]>(x)\n" + SCORES + TO_SIZE + "t = Transpose<perm=[0,2,3,1]>(f)\n"
        "y = ArgMax<axis=3, keepdims=0>(t)", lambda r: r[0], (2, 64, 96, 3), {},
    ),
    "resized to a number": (
        SCORES + 'y = Resize<mode="linear", coordinate_transformation_mode="half_pixel">(s, , , z)', best,
        (1, 3, 64, 96), {"z": np.array([1, 4, 64, 96])},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FIXED)
def test_models_of_one_size_take_every_size(tmp_path, kind):
    text, labels, shape, weights = FIXED[kind]
    last = shape[3] == 3
    model = fixed(made(text, "float[N,a,b,c] x" if last else "float[N,a,b,c] p", weights=weights), *shape)
    if "ArgMax" in text:
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64

    def feed(image):
        batch = planes(image).repeat(shape[0], axis=0)
        return batch.transpose(0, 2, 3, 1) if last else batch

    source, report, *_ = check(tmp_path, model, labels, feed, sizes=[(64, 96)])
    assert report.head == "linear" and any("64×96" in note for note in source.notes)
    # Beyond its own size it is the same network with its sizes free.
    free = made(PLAIN)
    with Segmenter(tmp_path / "m.engine") as net:
        # What was a number may stand for four times the scores' size as well: at multiples of 4 it is the same.
        for height, width in SIZES:
            image = photo(4 * height, 4 * width) if "number" in kind else photo(height, width)
            assert (net(image) == best(ran(free, {"p": planes(image)})[0])).mean() > 0.999


def test_a_size_that_cannot_be_freed_is_named(tmp_path):
    text = SCORES + "  e = Add(s, place)\n" + 'y = Resize<mode="linear">(e, , x4)'
    place = RANDOM.normal(size=(1, 4, 16, 24)).astype(np.float32)
    model = fixed(made(text, weights={"place": place}), 1, 3, 64, 96)
    assert "node e" in (said := refused(tmp_path, model)) or "e (Add)" in said
    model = made(text, weights={"place": place})
    assert "e (Add)" in refused(tmp_path, model)


def test_a_batch_of_one_that_is_baked_in_is_said(tmp_path):
    text = (
        SCORES
        + TO_SIZE
        + "  sh = Shape(f)\n  e = Slice(sh, i2, i4)\n  k = Concat<axis=0>(one4, e)\n  y = Reshape(f, k)"
    )
    model = made(text, weights={"one4": np.array([1, 4])})
    source, *_ = check(tmp_path, model)
    assert "takes one image at a time" in source.notes[0]


POOLED = """
  a = Conv<pads=[1,1,1,1]>(p, w1)
  b = MaxPool<kernel_shape=[K,K], strides=[S,S], pads=[1,1,1,1], ceil_mode=C>(a)
  s = Conv<pads=[1,1,1,1]>(b, k3)
  shp = Shape(p)
  hw = Slice(shp, i2, i4)
  sizes = Concat<axis=0>(nk, hw)
"""
TO_IMAGE = 'f = Resize<mode="linear">(s, , , sizes)\n'
ENDS = {
    "a Resize": TO_IMAGE + "y = Identity(f)",
    "a Reshape": TO_IMAGE + "y = Reshape(f, sizes)",
    "an Expand": TO_IMAGE + "e = Expand(half, sizes)\n y = Mul(f, e)",
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("window", [(3, 3, 0), (3, 2, 0), (2, 2, 1)], ids=str)
def test_a_batch_of_one_beside_free_sizes_is_freed_alone(tmp_path, window, end):
    kernel, stride, ceil = window
    text = (POOLED + ENDS[end]).replace("K,K", f"{kernel},{kernel}").replace("S,S", f"{stride},{stride}")
    weights = {"nk": np.array([1, 4]), "k3": weight(4, 6, 3, 3)}
    model = made(text.replace("=C", f"={ceil}"), "float[1,3,H,W] p", weights=weights)
    source, report, *_ = check(tmp_path, model)
    assert report.size_multiple == 1 and "equal to the model with 1 image at once" in source.notes[-2]
    assert not any("704" in note for note in source.notes)
    images = RANDOM.normal(size=(3, 3, 1009, 37)).astype(np.float32)
    alone = np.concatenate([ran(model, {"p": image[None]})[0] for image in images])
    together = ran(source.model, {"p": images})[0]
    assert together.shape == alone.shape
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_a_number_beside_free_sizes_stays_what_it_is(tmp_path):
    """A crop to 1000 is one, though at the size that is tried it takes all; the batch stays as it is then."""
    text = (POOLED + TO_IMAGE + "y = Slice(f, at0, at1000, a23)").replace("K,K", "3,3").replace("S,S", "3,3")
    weights = {"nk": np.array([1, 4]), "k3": weight(4, 6, 3, 3), "at0": np.zeros(2, int), "at1000": np.full(2, 1000)}
    model = made(text.replace("=C", "=0"), "float[1,3,H,W] p", weights=weights)
    source, *_ = check(tmp_path, model)
    image = RANDOM.normal(size=(1, 3, 1009, 37)).astype(np.float32)
    assert np.array_equal(ran(source.model, {"p": image})[0], ran(model, {"p": image})[0])


def test_a_batch_of_two_beside_free_sizes_is_freed(tmp_path):
    text = (POOLED + TO_IMAGE + "y = Identity(f)").replace("K,K", "3,3").replace("S,S", "3,3").replace("=C", "=0")
    model = made(text, "float[2,3,H,W] p", weights={"nk": np.array([2, 4]), "k3": weight(4, 6, 3, 3)})
    onnx.save(model, tmp_path / "m.onnx")
    source = import_model(tmp_path / "m.onnx")
    images = RANDOM.normal(size=(2, 3, 40, 37)).astype(np.float32)
    expected = ran(model, {"p": images})[0]
    np.testing.assert_allclose(ran(source.model, {"p": images[1:]})[0], expected[1:], atol=1e-5)


def test_a_model_that_pads_and_crops_by_itself_is_tiled_exactly(tmp_path):
    text = (
        """
  shi = Shape(x)
  size = Slice(shi, i2, i4)
  m = Neg(size)
  after = Mod(m, eight)
  pads = Concat<axis=0>(six, after)
  p = Pad(x, pads)
"""
        + SCORES
        + """
  u = Resize<mode="linear">(s, , x4)
  g = Slice(u, two0, size, a23)
  y = Softmax<axis=1>(g)
"""
    )
    weights = {"eight": np.array([8]), "six": np.zeros(6, np.int64), "two0": np.zeros(2, np.int64)}
    model = made(text, "float[N,3,H,W] x", weights=weights)
    _, report, card, head = check(tmp_path, model)
    assert (report.head, card.size_multiple, head.factor) == ("linear", 8, (4, 4))
    with Segmenter(tmp_path / "m.engine") as net:
        image = photo(301, 203)
        whole = net(image)
        with Segmenter(tmp_path / "m.engine", memory=net.plan(301, 203).bytes // 2) as tiled:
            assert tiled.plan(301, 203).grids
            np.testing.assert_array_equal(tiled(image), whole)


def test_a_crop_of_what_was_enlarged_is_the_heads(tmp_path):
    text = (
        SCORES
        + TO_SIZE.replace("p)", "p)", 1).split("shs")[0]
        + """
  u = Resize<mode="linear">(s, , x4)
  b = Slice(u, i0, rows, i2)
  y = Slice(b, i0, columns, i3)
"""
    )
    text = text.replace("  hw = Slice(shp, i2, i4)\n", "  rows = Slice(shp, i2, i3)\n  columns = Slice(shp, i3, i4)\n")
    _, report, card, _ = check(tmp_path, made(text))
    assert (report.head, card.size_multiple) == ("linear", 1)
    with Segmenter(tmp_path / "m.engine") as net:
        image = photo(301, 203)
        with Segmenter(tmp_path / "m.engine", memory=net.plan(301, 203).bytes // 2) as tiled:
            assert tiled.plan(301, 203).grids
            np.testing.assert_array_equal(tiled(image), net(image))


@pytest.mark.parametrize("multiple", [18, 100])
def test_multiples_that_no_usual_size_is_of(tmp_path, multiple):
    text = f"c = Conv<strides=[{multiple}, {multiple}]>(p, wk)\n r = Relu(c)\n"
    text += f"y = ConvTranspose<strides=[{multiple}, {multiple}]>(r, wt)"
    weights = {"wk": weight(2, 3, multiple, multiple), "wt": weight(2, 4, multiple, multiple)}
    onnx.save(made(text, weights=weights), tmp_path / "m.onnx")
    assert import_model(tmp_path / "m.onnx").sizes.multiple == multiple


def stale(text, weights):
    """A model whose ends say free sizes, and whose tensors inside are noted with those of 64×64 images."""
    model = made(text, "float[1,3,64,64] p", weights=weights)
    model = onnx.shape_inference.infer_shapes(model)
    assert any(dim.dim_value == 32 for value in model.graph.value_info for dim in value.type.tensor_type.shape.dim)
    for axis, letter in ((2, "H"), (3, "W")):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = letter
    return model


STALE = """
  fine = Conv<strides=[2,2], pads=[1,1,1,1]>(p, w1)
  coarse = MaxPool<kernel_shape=[2,2], strides=[2,2]>(fine)
  size = Shape(fine)
  up = Resize<mode="linear">(coarse, , , size)
  b = JOINED
  s = Conv(b, w3, b3)
  y = Resize<mode="linear">(s, , x2)
"""


@pytest.mark.parametrize("joined", ["Identity(up)", "Add(up, fine)"])
def test_sizes_noted_inside_a_model_of_free_sizes_are_dropped(tmp_path, joined):
    model = stale(STALE.replace("JOINED", joined), {})
    fresh = onnx.ModelProto()
    fresh.CopyFrom(model)
    del fresh.graph.value_info[:]
    onnx.save(model, tmp_path / "plain.onnx")
    image = photo(64, 96)
    with Segmenter(tmp_path / "plain.onnx") as net, pytest.raises(DeployError, match="build-engine") as refused:
        net(image)
    assert "\n" not in str(refused.value)
    source, *_ = check(tmp_path, fresh, sizes=[(64, 96), (32, 48)])
    assert not source.model.graph.value_info
    onnx.save(model, tmp_path / "m.onnx")
    build_engine(import_model(tmp_path / "m.onnx"), tmp_path / "m.engine", BuildConfig(latency_sizes=[(16, 16)]))
    with Segmenter(tmp_path / "m.engine") as net:
        assert (net(image) == best(ran(fresh, {"p": planes(image)})[0])).mean() > 0.999


def test_a_slice_to_a_place_beyond_every_map_goes_to_the_end(tmp_path):
    """As every second pixel is taken, and some exporters write ten million for the end; its tiles are exact too."""
    text = """
      odd = Slice(p, from, end, a23, two)
      s = Conv<pads=[1,1,1,1]>(odd, w1)
      y = Resize<mode="linear", coordinate_transformation_mode="half_pixel">(s, , x2)
    """
    places = {"from": np.array([0, 0]), "end": np.array([10_000_000, 10_000_000]), "two": np.array([2, 2])}
    model = made(text, gives="float[N,6,H,W] y", weights=places)
    _, report, *_ = check(tmp_path, model, sizes=((64, 96), (38, 62)))
    assert report.stages[0].halo is not None


def test_unpooling_of_one_size_is_freed(tmp_path):
    """Of what unpooling leaves zero, much is as it was whatever lies beside it: that is not out of reach."""
    text = """
      c1 = Conv<pads=[1,1,1,1]>(p, w1)
      m, i = MaxPool<kernel_shape=[2,2], strides=[2,2]>(c1)
      c2 = Conv<pads=[1,1,1,1]>(m, w2)
      u = MaxUnpool<kernel_shape=[2,2], strides=[2,2]>(c2, i, size)
      y = Conv(u, w3, b3)
    """

    def model(height, width):
        size = {"size": np.array([1, 6, height, width])}
        return fixed(made(text, opset=12, weights=size), 1, 3, height, width)

    source = reads(tmp_path, model(64, 96))
    image = RANDOM.standard_normal((1, 3, 40, 130)).astype(np.float32)
    name = source.model.graph.input[0].name
    np.testing.assert_allclose(ran(source.model, {name: image})[0], ran(model(40, 130), {"p": image})[0], atol=1e-5)
