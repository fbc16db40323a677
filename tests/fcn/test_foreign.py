"""Modules from elsewhere: weights, outputs, layouts, precisions, and functions respelled for the exporters."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fcn_deploy.fcn.checkpoint import load_state
from fcn_deploy.fcn.exportable import Exportable
from fcn_deploy.fcn.foreign import scores_of, unwrapped
from fcn_deploy.fcn.load_module import load_strictly
from safetensors.torch import save_file
from torch import nn
from zoo import Output, Pair, Plain, network, resized

from fcn_deploy import DeployError, MisuseError

IMAGE = torch.randn(1, 3, 24, 40, generator=torch.Generator().manual_seed(0))


def small(end=resized) -> nn.Module:
    torch.manual_seed(1)
    return Plain(end).eval()


def other_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    return Plain().state_dict()


# Weights


@pytest.mark.parametrize("container", ["state_dict", "model_state_dict", "model", "ema", None])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.module."])
def test_weights_are_found_where_training_scripts_put_them(tmp_path, container, prefix):
    state = {f"{prefix}{name}": value for name, value in other_weights().items()}
    if prefix == "model.":
        state["criterion.weight"] = torch.ones(4)
    torch.save({container: state, "epoch": 3, "optimizer": {"lr": 0.1}} if container else state, tmp_path / "w.pth")
    model, notes = small(), []
    load_strictly(model, load_state(tmp_path / "w.pth", notes.append), "w.pth", "m:net", notes.append)
    assert all(torch.equal(value, other_weights()[name]) for name, value in model.state_dict().items())
    assert len(notes) == bool(container) + bool(prefix)
    assert not container or f"under {container!r}" in notes[0]
    assert not prefix or f"prefix {prefix!r}" in notes[-1]
    assert ("criterion.weight" in " ".join(notes)) == (prefix == "model.")


def test_a_prefix_of_the_module_is_added_and_counters_may_lack(tmp_path):
    wrapped, notes = nn.Sequential(), []
    wrapped.add_module("net", small())
    state = {name: value for name, value in other_weights().items() if "num_batches" not in name}
    save_file(state, tmp_path / "w.safetensors")
    load_strictly(wrapped, load_state(tmp_path / "w.safetensors"), "w.safetensors", "m:net", notes.append)
    assert torch.equal(wrapped.net.score.weight, other_weights()["score.weight"]) and "'net.'" in notes[0]


def test_which_of_several_state_dicts_is_taken_is_said(tmp_path):
    torch.save({"ema": other_weights(), "model": other_weights()}, tmp_path / "w.pth")
    notes = []
    load_state(tmp_path / "w.pth", notes.append)
    assert "under 'model' are taken, and ema left out" in notes[0]


def test_weights_are_found_under_a_key_of_any_name_where_there_is_one_state_dict(tmp_path):
    optimizer = torch.optim.SGD(small().parameters(), lr=0.1).state_dict()
    for held in ({"network_weights": other_weights()}, {"trainer": {"state_dict": other_weights()}}):
        beside = {"optimizer_state": optimizer, "init_args": {"plans": {}}, "class_weights": torch.ones(3)}
        torch.save(held | beside, tmp_path / "w.pth")
        assert load_state(tmp_path / "w.pth").keys() == other_weights().keys()
    torch.save({"student": other_weights(), "teacher": other_weights()}, tmp_path / "w.pth")
    with pytest.raises(DeployError, match=r"several state dicts \(student, teacher\); save the one"):
        load_state(tmp_path / "w.pth")
    for held in (small(), {"model": small(), "epoch": 3}):
        torch.save(held, tmp_path / "w.pth")
        with pytest.raises(DeployError, match=r"a pickled object, whose code is not run; save model.state_dict\(\)"):
            load_state(tmp_path / "w.pth")


def test_names_of_wrapped_parts_are_those_of_the_parts():
    model, state = small(), {}
    for name, value in other_weights().items():
        first, rest = name.split(".", 1)
        state[f"net.{first}._orig_mod._checkpoint_wrapped_module.{rest}"] = value
    load_strictly(model, state, "w.pth", "m:net")
    assert torch.equal(model.score.weight, other_weights()["score.weight"])
    model.body = torch.compile(model.body)
    load_strictly(model, other_weights(), "w.pth", "m:net")


def test_batch_norms_of_the_batch_alone_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))
    with pytest.raises(DeployError, match="it: 1 keeps no running statistics"):
        scores_of(model, "it")


def test_weights_that_do_not_fit_are_told_by_name():
    state = other_weights() | {"extra.weight": torch.ones(1), "score.weight": torch.ones(7, 8, 1, 1)}
    del state["body.0.0.weight"]
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DeployError) as caught:
        load_strictly(model, state, "w.pth", "m:net")
    text = str(caught.value)
    for part in (
        "w.pth does not fit m:net", "1 missing (body.0.0.weight)", "1 unexpected (extra.weight)",
        "score.weight of [7, 8, 1, 1] instead of [4, 8, 1, 1]",
    ):  # fmt: skip
        assert part in text, text
    assert "\n" not in text and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(DeployError, match=r"of its 6 names 0 match; .* missing \(body.*, …\)"):
        load_strictly(model, {f"x{index}": torch.ones(1) for index in range(6)}, "w.pth", "m:net")


# What a module takes and gives


def gives(end, output=None, **kind):
    notes = []
    model = Plain(end).eval()
    made = scores_of(model, "it", output=output, note=notes.append, **kind)
    with torch.inference_mode():
        return made, made(IMAGE), model.score(model.body(IMAGE)), notes


@pytest.mark.parametrize(
    ("end", "output", "taken"),
    [
        (lambda y, x: {"out": y, "aux": y + 1}, None, "out"),
        (lambda y, x: {"out": y, "aux": y - 1}, "out", None),
        (lambda y, x: {"aux": y - 1, "logits": y}, None, "logits"),
        (lambda y, x: {"masks": y}, None, None),
        (lambda y, x: {"loss": y.sum(), "masks": y}, None, "masks"),
        (lambda y, x: (y, y + 1), None, "0"),
        (lambda y, x: (y.sum(), y), None, "1"),
        (lambda y, x: [y + 1, y], "1", None),
        (lambda y, x: Pair(y + 1, y), None, "logits"),
        (lambda y, x: Pair(y, y + 1), "features", None),
        (lambda y, x: Output(logits=y, hidden=(y, y)), None, "logits"),
        (lambda y, x: ([y, y + 1], y + 2), "0", "0"),
    ],
)
def test_the_scores_among_several_outputs(end, output, taken):
    torch.manual_seed(0)
    _, result, expected, notes = gives(end, output)
    assert torch.equal(result, expected)
    assert [note for note in notes if f"; {taken} is used" in note] if taken else not notes, notes


@pytest.mark.parametrize(
    ("end", "output", "said"),
    [
        (lambda y, x: {"a": y, "b": y}, None, "it gives a, b; name the scores with --output"),
        (lambda y, x: {"a": y, "b": y}, "c", "gives no output c; choose one of a, b"),
        (lambda y, x: y, "out", "gives one tensor; omit --output out"),
        (lambda y, x: (y[:, 0] > 0).long(), None, "gives int64.*before an argmax or a threshold"),
        (lambda y, x: "labels", None, "gives str"),
        (lambda y, x: {}, None, "gives dict"),
    ],
)
def test_outputs_that_are_no_scores_are_refused(end, output, said):
    with pytest.raises((MisuseError, DeployError), match=said):
        gives(end, output)


@pytest.mark.parametrize("kind", [torch.float16, torch.float64])
def test_scores_of_other_floats_are_given_as_float32(kind):
    _, result, scores, _ = gives(lambda y, x: {"aux": y, "out": y.to(kind)})
    assert result.dtype == torch.float32 and torch.equal(result, scores)


def test_one_score_without_an_axis_gets_one():
    made, result, expected, notes = gives(lambda y, x: y[:, 0])
    assert made.flat and torch.equal(result, expected[:, :1]) and "[N,H,W]" in notes[0]


def test_layouts_are_found_by_running():
    model, notes = network("channels-last"), []
    made = scores_of(model, "it", note=notes.append)
    assert made.in_last and made.out_last and made.channels == 3 and "[N,H,W,C]" in notes[0]
    with torch.inference_mode():
        expected = model(IMAGE.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        assert torch.equal(made(IMAGE), expected)
    made, result, expected, _ = gives(lambda y, x: y.permute(0, 2, 3, 1))
    assert not made.in_last and made.out_last and torch.equal(result, expected)


def test_channels_are_those_that_run():
    class DecoderFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.decode, self.encode = nn.Conv2d(16, 2, 1), nn.Conv2d(4, 16, 3, padding=1)

        def forward(self, x):
            return self.decode(self.encode(x))

    assert scores_of(DecoderFirst(), "it").channels == 4


def test_precision_device_and_mode_are_brought_to_float32_on_the_cpu_and_the_callers_module_is_left_alone():
    half, notes = small().half().train(), []
    made = scores_of(half, "it", note=notes.append)
    assert "in float16" in notes[0] and "training mode" in notes[1]
    assert next(made.parameters()).dtype == torch.float32 and next(half.parameters()).dtype == torch.float16
    with torch.inference_mode():
        assert made(IMAGE).dtype == torch.float32
    with torch.device("meta"):
        empty = Plain()
    with pytest.raises(DeployError, match="without values"):
        scores_of(empty, "it")


def test_a_module_that_writes_into_its_input_leaves_the_callers_alone():
    made, image = scores_of(network("bgr-in-place"), "it"), IMAGE.clone()
    with torch.inference_mode():
        first, second = made(image), made(image)
    assert made.mutates and torch.equal(image, IMAGE) and torch.equal(first, second)


def test_wrappers_are_taken_off():
    model = small()
    assert unwrapped(nn.DataParallel(torch.compile(model))) is model


# Functions in other words


@pytest.mark.parametrize("size", [1, 2, 3, (6, 2), (None, 3), (4, None), (7, 7)])
@pytest.mark.parametrize("pool", [F.adaptive_avg_pool2d, F.adaptive_max_pool2d])
def test_pooling_to_a_grid_is_equal_at_every_size(pool, size):
    for height in (1, 2, 3, 5, 6, 7, 13, 20):
        for width in (1, 4, 6, 11):
            x = torch.randn(2, 3, height, width)
            with Exportable() as mode:
                result = pool(x, size)
            torch.testing.assert_close(result, pool(x, size), atol=1e-6, rtol=1e-5)
    assert bool(mode.respelled) == (size != 1 or pool is F.adaptive_max_pool2d)


@pytest.mark.parametrize("size", [1, 2, (3, 2)])
def test_area_interpolation_to_a_grid_is_equal_at_every_size(size):
    for sides in ((1, 1), (5, 4), (7, 11), (20, 13)):
        x = torch.randn(2, 3, *sides)
        with Exportable() as mode:
            result = F.interpolate(x, size=size, mode="area")
        torch.testing.assert_close(result, F.interpolate(x, size=size, mode="area"), atol=1e-6, rtol=1e-5)
    assert mode.respelled == {"interpolate"}


@pytest.mark.parametrize("output_size", [None, (9, 13), (2, 3, 9, 13)])
def test_unpooling_is_equal(output_size):
    x = torch.randn(2, 3, 9, 13) if output_size else torch.randn(2, 3, 8, 12)
    pooled, places = F.max_pool2d(x, 2, 2, return_indices=True)
    with Exportable() as mode:
        result = F.max_unpool2d(pooled, places, 2, output_size=output_size)
    assert torch.equal(result, F.max_unpool2d(pooled, places, 2, output_size=output_size)) and mode.respelled


@pytest.mark.parametrize("kernel", [2, (2, 3)])
def test_patches_side_by_side_are_equal(kernel):
    """As MobileViT makes them, and puts them together again."""
    for size in ((6, 12), (7, 13)):  # of the second, the last row and column are in no patch
        x = torch.randn(2, 3, *size)
        with Exportable() as mode:
            patches = F.unfold(x, kernel, stride=kernel)
            whole = F.fold(patches, size, kernel, stride=kernel)
        assert torch.equal(patches, F.unfold(x, kernel, stride=kernel)) and mode.respelled == {"unfold", "fold"}
        assert torch.equal(whole, F.fold(patches, size, kernel, stride=kernel))


def test_what_exporters_take_is_left_alone():
    x = torch.randn(1, 2, 6, 8)
    with Exportable() as mode:
        nn.AvgPool2d(2)(x)
        F.avg_pool2d(x, (6, 8))  # of numbers: a kernel, not the image's size
        F.adaptive_max_pool2d(x, 2, return_indices=True)
        F.unfold(x, 3, padding=1)  # patches that overlap
        F.fold(F.unfold(x, 2), (6, 8), 2)
        F.adaptive_avg_pool2d(x, 1)
        F.interpolate(x, size=(12, 16), mode="bilinear")
    assert not mode.respelled and np.isfinite(x).all()


def test_of_shares_and_labels_that_max_gives_the_scores_are_used():
    notes = []
    made = scores_of(small(lambda y, x: resized(y, x).softmax(1).max(1)), "net", note=notes.append)
    assert made.labels and made(IMAGE).shape[1] > 1 and any("scores that it takes them of" in note for note in notes)
