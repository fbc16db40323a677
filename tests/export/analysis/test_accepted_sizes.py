"""What sizes a network takes, found by running it, and how it is made to take the others."""

import math

import numpy as np
import onnx
import pytest
from fcn_deploy.export.analysis.accepted_sizes import AcceptedSizes, find_accepted_sizes, run_quietly, try_size
from fcn_deploy.export.analysis.receptive_field import global_operator
from fcn_deploy.export.importer.fit_images import choose_fit, fit_images
from fcn_deploy.runtime.backends.onnxruntime import session
from helpers import onnx_model
from onnx import helper

from fcn_deploy import DeployError


def takes(multiple, smallest=1, factor=1, width=None, count=None):
    """A network that fails at all but multiples from `smallest` on; the runs are counted in `count`."""

    def run(height, wide):
        if count is not None:
            count.append((height, wide))
        if min(height, wide) < smallest:
            raise RuntimeError(f"{height}×{wide} is too small")
        if height % multiple or wide % (width or multiple):
            raise RuntimeError(f"{height}×{wide} does not fit")
        return 1, 5, height // factor, wide // factor

    return run


@pytest.mark.parametrize("smallest", [1, 7, 64, 65, 300])
@pytest.mark.parametrize(
    "multiple", [1, 2, 3, 4, 6, 7, 8, 12, 14, 16, 20, 24, 28, 32, 36, 48, 60, 64, 96, 100, 256, 320]
)
def test_multiple_and_smallest_size_are_found_apart_in_few_runs(multiple, smallest):
    runs = []
    found = find_accepted_sizes(takes(multiple, smallest, count=runs), "it")
    least = math.ceil(smallest / multiple) * multiple
    assert (found.multiple, found.smallest) == (multiple, least if least > multiple else 1)
    assert len(runs) <= 50 and max(map(max, runs)) <= 1920
    if multiple in (1, 2, 4, 8) and smallest == 1:  # most networks: an export waits for each pixel
        assert sum(height * width for height, width in runs) < 20_000


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (takes(4, factor=4), (4, 1, 4)),
        (takes(32, 64, factor=8), (32, 64, 8)),
        (lambda h, w: (1, 2, h // 2 * 2, w // 2 * 2), (2, 1, 1)),  # floors, and loses a row at odd sizes
        (lambda h, w: (1, 2, -(-h // 4), -(-w // 4)), (1, 1, 4)),  # needs no padding
        (lambda h, w: (1, 2, h, w) if min(h, w) > 6 else (1, 2, 1, 1), (1, 7, 1)),
        (lambda h, w: np.full((1, 2, h, w), np.nan if h * w < 81 else 1.0), (1, 9, 1)),
    ],
    ids=["coarse", "coarse-from-64", "floors", "ceils", "other-shape-when-small", "nan-when-small"],
)
def test_what_a_network_takes(run, expected):
    found = find_accepted_sizes(run, "it")
    assert (found.multiple, found.smallest, found.factor) == expected


def test_what_onnx_runtime_says_of_a_failure_is_told_by_its_node():
    nodes = [helper.make_node("Reshape", ["image", "s"], ["logits"], name="bake")]
    run = session(graph(nodes, {"s": np.int64([1, 3, 64, 64])}).SerializeToString())
    failure = try_size(lambda h, w: run_quietly(run, np.zeros((1, 3, h, w), np.float32))[0], 65, 97).failure
    assert failure.startswith("Reshape bake: The input tensor cannot be reshaped") and "onnxruntime" not in failure


def test_one_axis_that_takes_more_is_padded_like_the_other_and_that_is_said():
    found = find_accepted_sizes(takes(4, width=1), "it")
    assert found.multiple == 4
    assert found.notes == ("it takes less than multiples of 4 in width; both axes are padded to them",)
    assert not find_accepted_sizes(takes(4), "it").notes


def test_nan_at_small_sizes_is_said():
    (note,) = find_accepted_sizes(lambda h, w: np.full((1, 2, h, w), np.nan if h < 9 else 1.0), "it").notes
    assert "gives NaN at 1×1" in note and "padded to 9×9" in note


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda h, w: (1, 2, 64, 64), "gives 64×64 scores whatever the image's size"),
        (lambda h, w: (1, 2, h - 16 - h % 2, w - 16 - w % 2), "for 96×96 pixels, 16 fewer a side .*F.pad.*8,"),
        (lambda h, w: (1, 2, 192, 192), "gives 192×192 scores whatever"),
        (lambda h, w: (1, 2, h, 100), "gives …×100 scores whatever"),
        (lambda h, w: (1, 2, 192, w), "gives 192×… scores whatever"),
        (lambda h, w: (1, 2, h - 4, w - 4), "92×92 scores for 96×96 pixels"),
        (lambda h, w: (1, h, w, 2), r"as in \[N,H,W,K\]"),
        (lambda h, w: (1, 2, 2 * h, 2 * w), "192×192 scores for 96×96 pixels, and one for each at most"),
        (lambda h, w: (1, 2, h // 2, w // 4), "1/2 of the height and 1/4 of the width"),
        (lambda h, w: np.full((1, 2, h, w), np.nan), "NaN wherever it runs"),
        (lambda h, w: (1, 10), "a classifier's dense layer"),
        (lambda h, w: (1, 2, h, w) if h == w == 320 else 1 / 0, "runs at 320×320, and at 96×96 it fails: ZeroDiv"),
        (lambda h, w: (1, 2, h, w) if h * w % 2 else 1 / 0, "at 96×96 it fails: ZeroDivisionError"),
    ],
)
def test_what_follows_no_size_is_refused_for_what_it_did(run, said):
    with pytest.raises(DeployError, match=said) as caught:
        find_accepted_sizes(run, "it")
    assert "\n" not in str(caught.value)


def graph(nodes, constants, opset=18, classes=2):
    return onnx_model(nodes, constants, gives=("N", classes, "h", "w"), names=("image", "logits"), opset=opset)


RANDOM = np.random.default_rng(0)
WEIGHTS = {
    "w": RANDOM.normal(size=(2, 3, 4, 4)).astype(np.float32),
    "v": RANDOM.normal(size=(2, 2, 1, 1)).astype(np.float32),
}
STRIDED = helper.make_node("Conv", ["image", "w"], ["c"], strides=[4, 4])


def local(opset=18):
    return graph([STRIDED, helper.make_node("Conv", ["c", "v"], ["logits"])], WEIGHTS, opset)


def squeezing(opset=18):
    """Takes multiples of 4, gives scores at 1/4, and each of them depends on the whole image."""
    pooled = [
        helper.make_node("GlobalAveragePool", ["c"], ["g"], name="pool"),
        helper.make_node("Sub", ["c", "g"], ["logits"]),
    ]
    return graph([STRIDED, *pooled], WEIGHTS, opset)


def test_networks_are_padded_but_those_that_look_at_the_whole_image_are_resized():
    sizes = AcceptedSizes(4, 1, 4, 2)
    assert choose_fit(local(), sizes, None) == "pad" and choose_fit(squeezing(), sizes, None) == "resize"
    assert choose_fit(local(), sizes, "resize") == "resize" and choose_fit(squeezing(), sizes, "pad") == "pad"
    # Sizes that it takes are left alone; only images below the smallest are padded.
    assert choose_fit(squeezing(), AcceptedSizes(), None) == ""
    assert choose_fit(squeezing(), AcceptedSizes(1, 64), None) == "pad"


@pytest.mark.parametrize("opset", [11, 12, 13, 17, 18, 21])
def test_what_was_done_is_said_and_every_size_runs(opset):
    sizes = AcceptedSizes(4, 8, 4, 2)
    for model, fit, said in (
        (local(opset), "pad", "multiples of 4 only, from 8 on; images are padded to them with zeros"),
        (squeezing(opset), "pad", "padded to them with zeros, which GlobalAveragePool pool sees (--fit resize"),
        (
            squeezing(opset),
            "resize",
            "GlobalAveragePool pool looks at the whole image, where zeros would count; images",
        ),
    ):
        made, notes = fit_images(model, sizes, "it", fit)
        onnx.checker.check_model(made)
        assert said in " ".join(notes)
        run = session(made.SerializeToString())
        for size in ((1, 1), (3, 17), (8, 12), (37, 41)):
            image = np.random.default_rng(1).standard_normal((2, 3, *size), np.float32)
            result = run.run(None, {"image": image})[0]
            assert result.shape == (2, 2, *size) and np.isfinite(result).all()


def test_resizing_is_bilinear_there_and_back():
    import torch
    from torch.nn.functional import interpolate

    original = session(squeezing().SerializeToString())
    resized = session(fit_images(squeezing(), AcceptedSizes(4, 1, 4, 2), "it")[0].SerializeToString())
    for size, nearest in (
        ((1, 1), (4, 4)),
        ((5, 6), (4, 8)),
        ((37, 41), (36, 40)),
        ((62, 10), (64, 12)),
        ((8, 8), (8, 8)),
    ):
        image = np.random.default_rng(2).standard_normal((1, 3, *size), np.float32)
        inner = interpolate(torch.from_numpy(image), nearest, mode="bilinear").numpy()
        scores = original.run(None, {"image": inner})[0]
        expected = interpolate(torch.from_numpy(scores), size, mode="bilinear").numpy()
        np.testing.assert_allclose(resized.run(None, {"image": image})[0], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([helper.make_node("ReduceMean", ["image"], ["logits"], name="mean", axes=[2, 3])], "ReduceMean mean"),
        ([helper.make_node("ReduceMax", ["image"], ["logits"], name="max", axes=[-1, -2])], "ReduceMax max"),
        ([helper.make_node("ReduceMean", ["image"], ["logits"], name="mean", axes=[1])], ""),
        ([helper.make_node("MatMul", ["image", "image"], ["logits"], name="attention")], "MatMul attention"),
        ([helper.make_node("MatMul", ["image", "w"], ["logits"], name="dense")], ""),
        ([helper.make_node("Einsum", ["image", "image"], ["logits"], name="sum", equation="nkhw,nchw->nkc")], "Einsum"),
        ([helper.make_node("Einsum", ["image", "image"], ["logits"], name="dot", equation="nkhw,nkhw->nhw")], ""),
        ([helper.make_node("InstanceNormalization", ["image", "w", "w"], ["logits"], name="n")], "InstanceNorm"),
        # Arithmetic on sizes is none on the image.
        ([helper.make_node("Shape", ["image"], ["s"]), helper.make_node("ReduceProd", ["s"], ["p"]),
          helper.make_node("Reshape", ["image", "s"], ["logits"])], ""),
    ],
)  # fmt: skip
def test_what_looks_at_the_whole_image(nodes, said):
    found = global_operator(graph(nodes, WEIGHTS, opset=13))
    assert found.startswith(said) if said else found == ""


def test_sizes_that_would_take_too_much_memory_are_not_run(monkeypatch):
    """Attention from each pixel to each: 36 MB at 192×192 is 2.3 GB at 768×384."""
    import fcn_deploy.export.analysis.trial_memory as trial_memory

    taken, ran = {"now": 0}, []
    monkeypatch.setattr(trial_memory, "resident", lambda: 0)
    monkeypatch.setattr(trial_memory, "highest", lambda before: taken["now"])
    monkeypatch.setattr(trial_memory, "available_memory", lambda: 64e9)

    def run(height, width):
        ran.append(height * width)
        taken["now"] = int(36e6 * (height * width / 192**2) ** 2)
        assert taken["now"] <= 2.6e9, "more than the bound, but for what one step to a larger size tells"
        if height % 64 or width % 64:
            raise ValueError("not this one")
        return np.zeros((1, 3, height, width), np.float32)

    found = find_accepted_sizes(run, "it")
    assert found.multiple == 64 and max(ran) < 10 * 64 * 6 * 64


def test_memory_that_grows_with_the_pixels_ends_no_search(monkeypatch):
    """A wide network takes 300 MB at 192×192, and its sizes up to the bound are tried all the same."""
    import fcn_deploy.export.analysis.trial_memory as trial_memory

    taken = {"now": 0}
    monkeypatch.setattr(trial_memory, "resident", lambda: 0)
    monkeypatch.setattr(trial_memory, "highest", lambda before: taken["now"])
    monkeypatch.setattr(trial_memory, "available_memory", lambda: 64e9)

    def run(height, width):
        taken["now"] = int(300e6 * height * width / 192**2)
        if height % 32 or width % 32:
            raise ValueError("not this one")
        return np.zeros((1, 3, height, width), np.float32)

    assert find_accepted_sizes(run, "it").multiple == 32


def test_a_network_that_takes_too_much_at_every_size_says_so(monkeypatch):
    import fcn_deploy.export.analysis.trial_memory as trial_memory

    monkeypatch.setattr(trial_memory, "resident", lambda: 0)
    monkeypatch.setattr(trial_memory, "highest", lambda before: int(1.9e9))
    monkeypatch.setattr(trial_memory, "LEAST_TOLD", 1)  # of the first size too
    monkeypatch.setattr(trial_memory, "available_memory", lambda: 64e9)
    with pytest.raises(DeployError, match=r"it would take about \d+\.\d GB, over the 2\.0 GB of sizes tried"):
        find_accepted_sizes(lambda height, width: np.zeros((1, 3, height, width), np.float32), "it")
