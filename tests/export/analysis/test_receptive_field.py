"""The receptive field of a network, from its graph."""

from fractions import Fraction

import numpy as np
import onnx
import pytest
from fcn_deploy.export.analysis import reshape_shapes
from fcn_deploy.export.analysis.accepted_sizes import run_quietly
from fcn_deploy.export.analysis.receptive_field import receptive_field
from fcn_deploy.export.analysis.receptive_fields import Field, WholeImageError
from fcn_deploy.export.build.core import core_of, optimise_offline
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.runtime.backends.onnxruntime import session
from helpers import onnx_model
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper


def graph(nodes, constants=None, channels=1):
    return onnx_model(nodes, constants, takes=("N", channels, "H", "W"))


def layer(kind, index, random):
    """A random layer: (nodes from x{index} to x{index + 1}, constants)."""
    source, out, name = f"x{index}", f"x{index + 1}", f"w{index}"
    kernel, step, dilation = (int(random.integers(low, high)) for low, high in ((1, 5), (1, 3), (1, 3)))
    reach = (kernel - 1) * dilation
    if kind == "Conv":
        # As "same" as it gets: at multiples of the step there are as many cells as steps.
        total = max(reach + 1 - step, 0)
        before = int(random.integers(0, total + 1))
        pads = [before, before, total - before, total - before]
        weight = random.uniform(0.5, 1, (1, 1, kernel, kernel)).astype(np.float32)
        node = helper.make_node("Conv", [source, name], [out], kernel_shape=[kernel] * 2, strides=[step] * 2,
                                dilations=[dilation] * 2, pads=pads)  # fmt: skip
        return [node], {name: weight}
    if kind == "MaxPool":
        return [helper.make_node("MaxPool", [source], [out], kernel_shape=[2, 2], strides=[2, 2])], {}
    if kind == "ConvTranspose":
        weight = random.uniform(0.5, 1, (1, 1, 4, 4)).astype(np.float32)
        return [helper.make_node("ConvTranspose", [source, name], [out], strides=[2, 2], pads=[1] * 4)], {name: weight}
    mode, coordinates = random.choice(["linear", "nearest"]), random.choice(["half_pixel", "asymmetric"])
    factor = np.float32([1, 1, 2, 2])
    node = helper.make_node("Resize", [source, "", name], [out], mode=str(mode),
                            coordinate_transformation_mode=str(coordinates))  # fmt: skip
    return [node], {name: factor}


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["Conv", "MaxPool", "ConvTranspose", "Resize"]), min_size=1, max_size=5),
    seed=st.integers(0, 10_000),
)
def test_no_pixel_outside_the_field_changes_a_score_and_tiles_are_exact(kinds, seed):
    random = np.random.default_rng(seed)
    nodes, constants = [helper.make_node("Identity", ["image"], ["x0"])], {}
    for index, kind in enumerate(kinds):
        made, values = layer(kind, index, random)
        nodes, constants = nodes + made, constants | values
    nodes.append(helper.make_node("Identity", [f"x{len(kinds)}"], ["scores"]))
    model = graph(nodes, constants)
    found = receptive_field(model)
    period, (halo, _) = found.period, found.halo
    run = session(model.SerializeToString(), optimise=False)
    length = 2 * halo + 3 * period
    image = random.uniform(1, 2, (1, 1, period, length)).astype(np.float32)
    scores = run.run(None, {"image": image})[0]
    field = found.fields[1]
    # Perturb everything outside the field of a cell in the middle.
    cell = int((halo + period) / field.stride)
    if cell < scores.shape[3]:
        low, high = int(np.floor(field.stride * cell + field.low)), int(np.ceil(field.stride * cell + field.high))
        other = image + 5
        other[..., max(low, 0) : high + 1] = image[..., max(low, 0) : high + 1]
        np.testing.assert_array_equal(run.run(None, {"image": other})[0][..., cell], scores[..., cell])
    # A tile between two others.
    tile = run.run(None, {"image": np.ascontiguousarray(image[..., period:-period])})[0]
    cells = int(period / field.stride)
    start = int(halo / field.stride)
    ours, theirs = tile[..., start : start + cells], scores[..., start + cells : start + 2 * cells]
    if ours.shape == theirs.shape and ours.shape[-1] == cells:
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def node(kind, inputs, out, **attributes):
    return helper.make_node(kind, inputs, [out], **attributes)


def shuffled(source, out, index, random, channels):
    """Channels in groups, and back in another order, as view, transpose and view are exported: with sizes computed."""
    name = f"s{index}"
    groups = int(random.choice([side for side in (1, 2, 4) if channels % side == 0]))
    constants = {f"{name}/g": np.int64([groups]), f"{name}/k": np.int64([channels // groups])}
    constants |= {f"{name}/c": np.int64([channels]), f"{name}/n": np.int64([0]), f"{name}/2": np.int64([2])}
    constants |= {f"{name}/4": np.int64([4])}
    nodes = [
        node("Shape", [source], f"{name}/shape"),
        node("Slice", [f"{name}/shape", f"{name}/2", f"{name}/4"], f"{name}/hw"),
        node("Concat", [f"{name}/n", f"{name}/g", f"{name}/k", f"{name}/hw"], f"{name}/split", axis=0),
        node("Reshape", [source, f"{name}/split"], f"{name}/a"),
        node("Transpose", [f"{name}/a"], f"{name}/b", perm=[0, 2, 1, 3, 4]),
        node("Concat", [f"{name}/n", f"{name}/c", f"{name}/hw"], f"{name}/joined", axis=0),
        node("Reshape", [f"{name}/b", f"{name}/joined"], out),
    ]
    return nodes, constants


def blocks(source, out, index, channels, apart):
    """A pixel shuffle by 2 (`apart`: undone) by reshapes; returns the channels, too."""
    name = f"p{index}"
    constants = {f"{name}/{key}": np.int64([value]) for key, value in (("n", 0), ("2", 2), ("3", 3), ("4", 4))}
    nodes = [
        node("Shape", [source], f"{name}/shape"),
        node("Slice", [f"{name}/shape", f"{name}/2", f"{name}/3"], f"{name}/h"),
        node("Slice", [f"{name}/shape", f"{name}/3", f"{name}/4"], f"{name}/w"),
    ]
    two = f"{name}/2"
    if apart:
        nodes += [node("Div", [f"{name}/{side}", two], f"{name}/{side}s") for side in "hw"]
        constants |= {f"{name}/c": np.int64([channels]), f"{name}/o": np.int64([channels * 4])}
        first = [f"{name}/n", f"{name}/c", f"{name}/hs", two, f"{name}/ws", two]
        last, order = [f"{name}/n", f"{name}/o", f"{name}/hs", f"{name}/ws"], [0, 1, 3, 5, 2, 4]
    else:
        nodes += [node("Mul", [f"{name}/{side}", two], f"{name}/{side}s") for side in "hw"]
        constants |= {f"{name}/c": np.int64([channels // 4])}
        first = [f"{name}/n", f"{name}/c", two, two, f"{name}/h", f"{name}/w"]
        last, order = [f"{name}/n", f"{name}/c", f"{name}/hs", f"{name}/ws"], [0, 1, 4, 2, 5, 3]
    nodes += [
        node("Concat", first, f"{name}/first", axis=0),
        node("Reshape", [source, f"{name}/first"], f"{name}/a"),
        node("Transpose", [f"{name}/a"], f"{name}/b", perm=order),
        node("Concat", last, f"{name}/last", axis=0),
        node("Reshape", [f"{name}/b", f"{name}/last"], out),
    ]
    return nodes, constants, channels * 4 if apart else channels // 4


KINDS = ("Conv", "Pool", "Deconv", "Resize", "Pad", "Slice", "Focus", "Dense", "Spatial", "Shuffle", "Split", "Depth",
         "Space", "Apart", "Together", "Residual")  # fmt: skip


def block(kind, index, channels, random):
    """A block of a random network from x{index} to x{index + 1}: nodes, constants, channels of its result."""
    source, out, w = f"x{index}", f"x{index + 1}", f"w{index}"

    def integer(low, high):
        return int(random.integers(low, high))

    def weight(*shape):
        return random.uniform(0.5, 1, shape).astype(np.float32)

    if kind == "Conv":
        kernel, step, dilation = (integer(1, 4), integer(1, 4)), integer(1, 3), integer(1, 3)
        attributes = {"strides": [step] * 2, "dilations": [dilation] * 2}
        attributes |= {"auto_pad": "SAME_UPPER"} if random.integers(2) else {"pads": [integer(0, 3) for _ in range(4)]}
        return [node("Conv", [source, w], out, **attributes)], {w: weight(4, channels, *kernel)}, 4
    if kind == "Pool":
        which = str(random.choice(["MaxPool", "AveragePool"]))
        return [node(which, [source], out, kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 0, 1])], {}, channels
    if kind == "Deconv":
        attributes = {"strides": [2, 2], "pads": [integer(0, 2) for _ in range(4)]}
        return [node("ConvTranspose", [source, w], out, **attributes)], {w: weight(channels, 2, 4, 3)}, 2
    if kind == "Resize":
        attributes = {"mode": str(random.choice(["linear", "nearest", "cubic"]))}
        attributes["coordinate_transformation_mode"] = str(random.choice(["half_pixel", "asymmetric"]))
        attributes["nearest_mode"] = str(random.choice(["floor", "ceil", "round_prefer_floor"]))
        factor = random.choice([0.5, 1.5, 2.0])
        if random.integers(2):
            return (
                [node("Resize", [source, "", w], out, axes=[2, 3], **attributes)],
                {w: np.float32([factor] * 2)},
                channels,
            )
        return [node("Resize", [source, "", w], out, **attributes)], {w: np.float32([1, 1, factor, 2])}, channels
    if kind == "Pad":
        mode = str(random.choice(["constant", "reflect", "edge"]))
        low = -1 if mode == "constant" else 0
        pads = np.int64([0, 0, integer(low, 3), integer(low, 3), 0, 0, integer(low, 3), integer(low, 3)])
        return [node("Pad", [source, w], out, mode=mode)], {w: pads}, channels
    if kind == "Slice":
        names = [f"{w}/{name}" for name in ("starts", "ends", "axes", "steps")]
        step = integer(1, 3)
        values = [[integer(0, 3), 0], [2**31 - 1, channels], [3, 1], [step, 1]]
        return [node("Slice", [source, *names], out)], dict(zip(names, map(np.int64, values), strict=True)), channels
    if kind == "Focus":
        nodes, constants = [], {f"{w}/axes": np.int64([2, 3]), f"{w}/steps": np.int64([2, 2]),
                                f"{w}/ends": np.int64([2**31 - 1] * 2)}  # fmt: skip
        for part, corner in enumerate(((0, 0), (1, 0), (0, 1), (1, 1))):
            constants[f"{w}/{part}"] = np.int64(corner)
            inputs = [source, f"{w}/{part}", f"{w}/ends", f"{w}/axes", f"{w}/steps"]
            nodes.append(node("Slice", inputs, f"{w}/part{part}"))
        return [*nodes, node("Concat", [f"{w}/part{p}" for p in range(4)], out, axis=-3)], constants, channels * 4
    if kind == "Dense":
        # As in ConvNeXt: channels last, normalised, a dense layer, and back.
        nodes = [
            node("Transpose", [source], f"{w}/last", perm=[0, 2, 3, 1]),
            node("LayerNormalization", [f"{w}/last", f"{w}/scale"], f"{w}/normal", axis=-1),
            node("MatMul", [f"{w}/normal", f"{w}/dense"], f"{w}/product"),
            node("Add", [f"{w}/product", f"{w}/bias"], f"{w}/sum"),
            node("Softmax", [f"{w}/sum"], f"{w}/soft", axis=3),
            node("Transpose", [f"{w}/soft"], out, perm=[0, 3, 1, 2]),
        ]
        constants = {f"{w}/scale": weight(channels), f"{w}/dense": weight(channels, 3), f"{w}/bias": weight(3)}
        return nodes, constants, 3
    if kind == "Spatial":
        # Attention over places alone: what channels say together.
        nodes = [
            node("ReduceMean", [source, f"{w}/axis"], f"{w}/mean"),
            node("ReduceMax", [source, f"{w}/axis"], f"{w}/max"),
            node("Concat", [f"{w}/mean", f"{w}/max"], f"{w}/both", axis=1),
            node("Conv", [f"{w}/both", f"{w}/kernel"], f"{w}/weights", pads=[1] * 4),
            node("Mul", [source, f"{w}/weights"], out),
        ]
        return nodes, {f"{w}/axis": np.int64([1]), f"{w}/kernel": weight(1, 2, 3, 3)}, channels
    if kind == "Shuffle":
        return *shuffled(source, out, index, random, channels), channels
    if kind == "Split":
        first = integer(1, channels) if channels > 1 else 1
        if channels == 1:
            return [node("Identity", [source], out)], {}, 1
        parts = helper.make_node("Split", [source, w], [f"{w}/a", f"{w}/b"], axis=1)
        order = np.int64(random.permutation(channels))
        joined = node("Concat", [f"{w}/b", f"{w}/a"], f"{w}/joined", axis=1)
        gathered = node("Gather", [f"{w}/joined", f"{w}/order"], out, axis=1)
        return [parts, joined, gathered], {w: np.int64([first, channels - first]), f"{w}/order": order}, channels
    if kind == "Residual":
        nodes = [node("Conv", [source, w], f"{w}/conv", pads=[1] * 4), node("Add", [source, f"{w}/conv"], f"{w}/sum")]
        nodes.append(node("Mul", [f"{w}/sum", f"{w}/scale"], out))
        return nodes, {w: weight(channels, channels, 3, 3), f"{w}/scale": weight(channels, 1, 1)}, channels
    if kind == "Space":
        return [node("SpaceToDepth", [source], out, blocksize=2)], {}, channels * 4
    if kind == "Apart":
        return blocks(source, out, index, channels, True)
    # What makes places of channels wants four times as many.
    widened = node("Conv", [source, w], f"{w}/wide")
    constants, wide = {w: weight(4, channels, 1, 1)}, f"{w}/wide"
    if kind == "Depth":
        mode = str(random.choice(["DCR", "CRD"]))
        return [widened, node("DepthToSpace", [wide], out, blocksize=2, mode=mode)], constants, 1
    nodes, more, channels = blocks(wide, out, index, 4, False)
    return [widened, *nodes], constants | more, channels


@settings(max_examples=150, deadline=None)
@given(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4), seed=st.integers(0, 10_000))
def test_no_score_depends_on_more_than_its_computed_field(kinds, seed):
    """Each row, and each column, of an image is changed alone: what moves with it is inside the field."""
    random = np.random.default_rng(seed)
    nodes, constants, channels = [helper.make_node("Identity", ["image"], ["x0"])], {}, 2
    for index, kind in enumerate(kinds):
        made, values, channels = block(kind, index, channels, random)
        nodes, constants = nodes + made, constants | values
    nodes.append(helper.make_node("Identity", [f"x{len(kinds)}"], ["scores"]))
    model = graph(nodes, constants, channels=2)
    onnx.checker.check_model(model)
    try:
        found = receptive_field(model)
    except WholeImageError as error:  # what cannot be divided into blocks
        assert "cannot be followed" in str(error) and len(kinds) > 1
        return
    run = session(model.SerializeToString(), optimise=False)
    period = found.period
    side = max(1, -(-24 // period)) * period
    if side > 96:
        return
    image = random.uniform(1, 2, (1, 2, side, side)).astype(np.float32)
    try:
        (plain,) = run_quietly(run, image)
    except Exception:  # the padding is too small, or the map, for this size
        return
    if not plain.size:  # a map may also be cut to nothing without an error
        return
    changed = np.repeat(image, 2 * side + 1, 0)  # the last as it is: a batch of another size may round otherwise
    for pixel in range(side):
        changed[pixel, :, pixel] += 3
        changed[side + pixel, :, :, pixel] += 3
    scores = run.run(None, {"image": changed})[0]
    moved = (np.abs(scores[:-1] - scores[-1:]) > 1e-6 * np.ptp(scores)).any(1)  # [2 · side, h, w]
    for axis, of in ((0, moved[:side].any(2)), (1, moved[side:].any(1))):
        field = found.fields[axis]
        for pixel, cell in np.argwhere(of):
            low, high = field.stride * int(cell) + field.low, field.stride * int(cell) + field.high
            assert low <= pixel <= high, (kinds, axis, pixel, cell, low, high)


def test_known_fields():
    three = {"w": np.ones((1, 1, 3, 3), np.float32)}
    conv = helper.make_node("Conv", ["image", "w"], ["a"], pads=[1] * 4)
    again = helper.make_node("Conv", ["a", "w"], ["scores"], pads=[1] * 4, strides=[2, 2])
    field = receptive_field(graph([conv, again], three)).fields[0]
    assert (field.stride, field.low, field.high, field.period) == (2, -2, 2, 2)
    assert receptive_field(graph([conv, again], three)).halo == (2, 2)
    dilated = helper.make_node("Conv", ["image", "w"], ["scores"], pads=[4] * 4, dilations=[4, 4])
    assert receptive_field(graph([dilated], three)).halo == (4, 4)


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([helper.make_node("GlobalAveragePool", ["image"], ["scores"], name="gap")], "GlobalAveragePool gap"),
        ([helper.make_node("InstanceNormalization", ["image", "one", "one"], ["scores"], name="norm")], "Instance"),
        ([helper.make_node("ReduceMean", ["image"], ["m"]), helper.make_node("Sub", ["image", "m"], ["scores"])],
         "ReduceMean m"),
        ([helper.make_node("Resize", ["image", "", "", "sizes"], ["scores"], name="up")], "Resize up goes to a size"),
        ([helper.make_node("Resize", ["image", "", "two"], ["scores"], name="up", mode="linear",
                           coordinate_transformation_mode="align_corners")], "align_corners"),
        ([helper.make_node("Add", ["image", "map"], ["scores"], name="position")], "differs from place to place"),
        ([helper.make_node("Strange", ["image"], ["scores"], name="x", domain="other")], "Strange x"),
        ([helper.make_node("Relu", ["image"], ["scores"], name="x", domain="other")], "Relu x"),
        ([helper.make_node("Add", ["image", "row"], ["scores"], name="columns")], "differs from place to place"),
        ([helper.make_node("MaxPool", ["image"], ["p", "i"], kernel_shape=[2, 2], strides=[2, 2]),
          helper.make_node("MaxUnpool", ["p", "i"], ["scores"], kernel_shape=[2, 2], strides=[2, 2], name="un")],
         "MaxUnpool un"),
        ([helper.make_node("GroupNormalization", ["image", "one", "one"], ["scores"], name="g", num_groups=1)], "Gr"),
        ([helper.make_node("MatMul", ["image", "image"], ["scores"], name="attend")], "MatMul attend"),
        ([helper.make_node("MatMul", ["image", "eight"], ["scores"], name="columns")], "MatMul columns works along"),
        ([helper.make_node("Einsum", ["image"], ["scores"], name="e", equation="nchw->nhwc")], "Einsum e"),
        ([helper.make_node("Softmax", ["image"], ["scores"], name="places", axis=3)], "Softmax places works along"),
        ([helper.make_node("Conv", ["image", "image"], ["scores"], name="c", kernel_shape=[3, 3])], "Conv c takes two"),
        ([helper.make_node("Transpose", ["image"], ["scores"], perm=[0, 1, 3, 2])], "not laid out as"),
        ([helper.make_node("Shape", ["image"], ["s"]), helper.make_node("Resize", ["image", "", "", "s"], ["scores"],
                                                                        name="up")], "Resize up"),
        ([helper.make_node("Slice", ["image", "eights", "sixteens", "last"], ["scores"], name="cut")], "Slice cut"),
        ([helper.make_node("Reshape", ["image", "turned"], ["scores"], name="mix")], "Reshape mix"),
        ([helper.make_node("BatchNormalization", ["image", *["one"] * 4], ["scores"], name="b", training_mode=1)],
         "BatchNormalization b takes its statistics"),
    ],
)  # fmt: skip
def test_what_looks_at_the_whole_image_is_named(nodes, said):
    constants = {
        "one": np.ones(1, np.float32), "sizes": np.int64([1, 1, 64, 64]), "two": np.float32([1, 1, 2, 2]),
        "map": np.ones((1, 1, 8, 8), np.float32), "row": np.ones(8, np.float32), "eight": np.ones((8, 8), np.float32),
        "eights": np.int64([8]), "sixteens": np.int64([16]), "last": np.int64([3]), "turned": np.int64([0, 1, -1, 17]),
    }  # fmt: skip
    with pytest.raises(WholeImageError, match=said):
        receptive_field(graph(nodes, constants))


def test_softmax_of_old_opsets_is_over_places_too():
    node = helper.make_node("Softmax", ["image"], ["scores"], name="old", axis=1)
    new, old = graph([node]), graph([node])
    old.opset_import[0].version = 12
    assert receptive_field(new).halo == (0, 0)
    with pytest.raises(WholeImageError, match="Softmax old"):
        receptive_field(old)


def test_a_part_that_starts_at_features_has_its_field_in_pixels_of_the_image():
    three = {"w": np.ones((1, 1, 3, 3), np.float32)}
    conv = helper.make_node("Conv", ["image", "w"], ["scores"], pads=[1] * 4, strides=[2, 2])
    features = Field(Fraction(8), Fraction(0), Fraction(7), 8)
    found = receptive_field(graph([conv], three), (features, features))
    assert (found.fields[0].stride, found.fields[0].low, found.fields[0].high, found.period) == (16, -8, 15, 16)
    assert found.halo == (16, 16)


def test_wide_networks_are_not_run_for_the_shapes_of_their_reshapes(monkeypatch):
    def run(*model, **options):
        raise AssertionError("run at full width: minutes, and gigabytes")

    nodes, constants = shuffled("y", "scores", 0, np.random.default_rng(0), 4)
    conv = helper.make_node("Conv", ["image", "w"], ["y"], pads=[1] * 4)
    model = graph([conv, *nodes], constants | {"w": np.ones((4, 1, 3, 3), np.float32)})
    monkeypatch.setattr(reshape_shapes, "session", run)
    assert receptive_field(model).halo == (1, 1)


@pytest.mark.slow
def test_the_halo_at_full_width(trained):
    core = optimise_offline(core_of(import_model(trained / "camvid.onnx")).model)
    assert receptive_field(core).halo == (480, 480) and receptive_field(core).period == 32
