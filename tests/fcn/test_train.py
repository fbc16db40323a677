"""Training, resuming, checkpoints and evaluation."""

import json

import numpy as np
import pytest
import torch
from helpers import checkpoint_of, command, one_error, random_network
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from calibration.digits import Digits
from fcn.augment import augment
from fcn.checkpoint import load_checkpoint, save_checkpoint
from fcn.train import Recipe, train
from runtime import DeployError, MisuseError, ModelCard

CARD = ModelCard(("a", "b"), mean=(0, 0, 0), std=(1, 1, 1))


@settings(max_examples=40, deadline=None)
@given(height=st.integers(8, 90), width=st.integers(8, 90), seed=st.integers(0, 99))
def test_samples_have_the_crops_size_and_labels_follow_the_image(height, width, seed):
    random = np.random.default_rng(seed)
    labels = (random.random((height, width)) < 0.5).astype(np.uint8)
    image = np.repeat(labels[:, :, None] * 200, 3, 2).astype(np.uint8)
    sample, wanted = augment(image, labels, CARD, (40, 56), random, scale=(0.5, 2.0), brightness=0)
    assert sample.shape == (3, 40, 56) and wanted.shape == (40, 56)
    assert set(wanted.unique().tolist()) <= {0, 1, 255}
    assert (wanted != 255).any()


def test_labels_stay_on_their_pixels():
    labels = np.zeros((64, 64), np.uint8)
    labels[:, 32:] = 1
    image = np.repeat(labels[:, :, None] * 200, 3, 2)
    for seed in range(20):
        random = np.random.default_rng(seed)
        sample, wanted = augment(image, labels, CARD, (64, 64), random, scale=(1.3, 2.0), brightness=0)
        bright = sample[0] > 100
        agree = (bright == (wanted == 1))[wanted != 255].float().mean()
        assert agree > 0.97  # but for the blur of the one edge


def test_flipping_and_brightness_can_be_turned_off():
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    labels = np.zeros((32, 32), np.uint8)
    for seed in range(8):
        random = np.random.default_rng(seed)
        sample, _ = augment(image, labels, CARD, (32, 32), random, scale=(1, 1), flip=False, brightness=0)
        np.testing.assert_allclose(sample.numpy(), image.transpose(2, 0, 1))


class KilledError(Exception):
    """Stands for a run that is killed after an epoch."""


def run(out, epochs=3, resume=False, stop_after=None, seed=0, recipe=None):
    """Train a narrow network on a few small canvases."""
    checkpoint = checkpoint_of(random_network(seed, classes=11, backbone="mobilenet-v2", width=0.125))
    sizes = ((64, 96), (97, 61), (40, 40))

    def on_epoch(record):
        if record["epoch"] == stop_after:
            raise KilledError

    recipe = recipe or Recipe(epochs=epochs, batch=4, crop=(64, 64), flip=False)
    return train(checkpoint, Digits("train", count=10, sizes=sizes), Digits("val", count=3, sizes=sizes), recipe, out,
                 resume=resume, on_epoch=on_epoch)  # fmt: skip


def test_a_run_killed_midway_resumes_to_the_same_result(tmp_path):
    whole = run(tmp_path / "whole.safetensors")
    with pytest.raises(KilledError):
        run(tmp_path / "cut.safetensors", stop_after=2)
    assert (tmp_path / "cut.safetensors.state").exists()
    resumed = run(tmp_path / "cut.safetensors", resume=True)
    strip = [{key: value for key, value in record.items() if key != "seconds"} for record in whole.history]
    assert strip == [{k: v for k, v in record.items() if k != "seconds"} for record in resumed.history]
    first, second = (load_checkpoint(tmp_path / f"{name}.safetensors").model.state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.safetensors", "whole.safetensors"]


def test_resuming_needs_something_to_resume_and_the_same_recipe(tmp_path):
    with pytest.raises(MisuseError, match=r"no .*state to resume"):
        run(tmp_path / "x.safetensors", resume=True)
    with pytest.raises(KilledError):
        run(tmp_path / "x.safetensors", stop_after=1)
    with pytest.raises(MisuseError, match="another epochs"):
        run(tmp_path / "x.safetensors", epochs=9, resume=True)
    (tmp_path / "x.safetensors.state").write_bytes(b"junk")
    with pytest.raises(DeployError, match="damaged"):
        run(tmp_path / "x.safetensors", resume=True)


def test_training_lowers_the_loss_and_keeps_the_best_epoch(tmp_path):
    recipe = Recipe(epochs=6, batch=4, crop=(64, 64), flip=False, class_weights="sqrt", rate=5e-3)
    progress = run(tmp_path / "x.safetensors", recipe=recipe)
    losses = [record["loss"] for record in progress.history]
    assert losses[-1] < 0.7 * losses[0]
    best = max(progress.history, key=lambda record: record["val_miou"])
    assert best["epoch"] == progress.best_epoch
    assert load_checkpoint(tmp_path / "x.safetensors").training["epoch"] == progress.best_epoch


def test_it_stops_early_where_nothing_gets_better(tmp_path):
    recipe = Recipe(epochs=30, batch=4, crop=(32, 32), flip=False, patience=1, rate=1e-9)
    assert len(run(tmp_path / "x.safetensors", recipe=recipe).history) < 30


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    recipe = Recipe(epochs=2, batch=4, crop=(64, 64), rate=1e30)
    with pytest.raises(DeployError, match="lower --rate"):
        run(tmp_path / "x.safetensors", recipe=recipe)


def test_validation_without_a_counted_pixel_is_no_success(tmp_path):
    class Void(Digits):
        def __getitem__(self, index):
            image, labels = super().__getitem__(index)
            return image, np.full_like(labels, 255)

    checkpoint = checkpoint_of(random_network(classes=11, backbone="mobilenet-v2", width=0.125))
    recipe = Recipe(epochs=1, batch=2, crop=(32, 32))
    with pytest.raises(DeployError, match="no counted pixel"):
        train(checkpoint, Digits("train", count=2), Void("val", count=1), recipe, tmp_path / "x.safetensors")


def test_a_stopped_run_is_not_overwritten_by_a_new_one(tmp_path):
    (tmp_path / "x.safetensors.state").write_text("hours of work")
    said = one_error(command("train-fcn", "-o", tmp_path / "x.safetensors", ok=2))
    assert "go on with --resume" in said and (tmp_path / "x.safetensors.state").read_text() == "hours of work"


def test_recipes_that_make_no_sense():
    for wrong, said in (({"epochs": 0}, "epochs is 0"), ({"crop": (8, 64)}, "8x64"), ({"rate": 0}, "rate is 0"),
                        ({"class_weights": "some"}, "some"), ({"batch": 1}, "batch is 1")):  # fmt: skip
        with pytest.raises(MisuseError, match=said):
            Recipe(**wrong)


def test_checkpoints_come_back_whole(tmp_path):
    checkpoint = checkpoint_of(random_network(upsampling="learned", stride=16), dtype="uint16")
    checkpoint.training["note"] = "kept"
    save_checkpoint(tmp_path / "x.safetensors", checkpoint)
    loaded = load_checkpoint(tmp_path / "x.safetensors")
    assert loaded.card == checkpoint.card and loaded.training == {"note": "kept"}
    assert loaded.model.architecture == checkpoint.model.architecture and not loaded.model.training
    x = torch.randn(1, 3, 37, 41)
    with torch.inference_mode():
        assert torch.equal(loaded.model(x), checkpoint.model(x))


def test_broken_and_foreign_checkpoints_are_one_line(tmp_path, exports):
    from safetensors.torch import load_file, save_file

    whole = (exports / "narrow.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "junk.safetensors").write_bytes(b"junk" * 100)
    (tmp_path / "junk.pth").write_bytes(b"junk")
    save_file({"x": torch.ones(1)}, tmp_path / "foreign.safetensors")
    torch.save({"a": 1}, tmp_path / "odd.pth")
    for name in ("cut.safetensors", "junk.safetensors", "foreign.safetensors", "junk.pth", "odd.pth"):
        with pytest.raises(DeployError) as caught:
            load_checkpoint(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(MisuseError, match="does not exist"):
        load_checkpoint(tmp_path / "none.safetensors")
    # Weights that are not of the architecture they name.
    from safetensors import safe_open

    with safe_open(exports / "narrow.safetensors", framework="pt") as file:
        metadata = file.metadata()
    other = json.loads(metadata["fcn_deploy.architecture"]) | {"backbone": "resnet50"}
    state = load_file(exports / "narrow.safetensors")
    save_file(state, tmp_path / "other.safetensors", metadata | {"fcn_deploy.architecture": json.dumps(other)})
    with pytest.raises(DeployError, match=r"other\.safetensors does not hold the FCN-8s resnet50 it says"):
        load_checkpoint(tmp_path / "other.safetensors")


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("it ran",))

    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(DeployError, match="cannot read weights"):
        load_checkpoint(tmp_path / "evil.pth")


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    digits = Digits("train", count=5, sizes=((64, 96), (50, 70)))
    for split in ("train", "val"):
        for index in range(5):
            image, labels = digits[index]
            for folder, array in ((root / split, image), (root / f"{split}annot", labels)):
                folder.mkdir(exist_ok=True)
                Image.fromarray(array).save(folder / f"{index}.png")
    (root / "classes.txt").write_text("\n".join(digits.classes))
    return root


def test_train_and_eval_from_the_command_line(small_data, tmp_path):
    out = tmp_path / "m.safetensors"
    network = ("--backbone", "mobilenet-v2", "--width", "0.125")
    options = ("--data", small_data, *network, "--crop", "32x64", "--batch", "2", "--epochs", "1", "-o", out)
    done = command("train-fcn", *options)
    assert "FCN-8s mobilenet-v2" in done.stdout and "epoch   1/1" in done.stdout and "random weights" in done.stdout
    assert "exists already" in one_error(command("train-fcn", *options, ok=2))
    table = command("eval-fcn", out, "--data", small_data).stdout
    for word in ("digit 3", "pixel accuracy", "mean accuracy", "mean IoU", "frequency-weighted IoU"):
        assert word in table
    report = json.loads(command("eval-fcn", out, "--data", small_data, "--json").stdout)
    assert report["images"] == 5 and 0 <= report["mean_iou"] <= 1 and len(report["class_iou"]) == 11


def test_train_misuse_is_one_line(small_data, tmp_path):
    out = tmp_path / "m.safetensors"
    for words, code, said in (
        (("-o", tmp_path / "m.pth"), 2, "not named .safetensors"),
        (("-o", out, "--data", tmp_path / "none"), 2, "not a folder"),
        (("-o", out, "--backbone", "vgg19"), 2, "vgg19"),
        (("-o", out, "--crop", "big"), 2, "HEIGHTxWIDTH"),
        (("-o", out, "--stride", "4"), 2, "stride 4"),
        (("-o", out, "--data", small_data, "--resume"), 2, "to resume from"),
        (("-o", out, "--data", small_data, "--backbone-weights", tmp_path / "w.pth"), 2, "does not exist"),
    ):
        assert said in one_error(command("train-fcn", *words, ok=code))
    assert not list(tmp_path.iterdir())


def test_eval_misuse_is_one_line(exports, small_data, tmp_path):
    assert "does not exist" in one_error(command("eval-fcn", tmp_path / "x.engine", ok=2))
    done = command("eval-fcn", exports / "narrow.engine", "--data", small_data, ok=2)
    assert "has 11 classes and the model has 5" in one_error(done)
    assert "has 11 classes and" in one_error(command("eval-fcn", exports / "narrow.onnx", ok=2))


def test_quantisation_aware_training_rounds_as_the_engines_do(tmp_path):
    from export.passes.quantize import PAIR_LIMIT
    from fcn.quantization import WEIGHT_STEPS, fake_quantised, fake_weight

    assert PAIR_LIMIT // 2 == WEIGHT_STEPS
    weight = torch.randn(6, 3, 3, 3, requires_grad=True)
    rounded = fake_weight(weight)
    steps = rounded / (weight.abs().flatten(1).amax(1) / WEIGHT_STEPS).view(-1, 1, 1, 1)
    assert torch.allclose(steps, steps.round(), atol=1e-3) and steps.abs().max() <= WEIGHT_STEPS + 1e-3
    rounded.sum().backward()
    assert torch.allclose(weight.grad, torch.ones_like(weight), atol=0.02)  # straight through
    model = random_network(classes=3, width=0.125)
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        plain = model(x)
        with fake_quantised(model):
            assert not torch.equal(model(x), plain)
        assert torch.equal(model(x), plain)  # and nothing of it stays


def test_a_checkpoint_is_fine_tuned_for_int8(small_data, tmp_path):
    network = ("--backbone", "mobilenet-v2", "--width", "0.125", "--crop", "64x64", "--batch", "2", "--epochs", "1")
    command("train-fcn", "--data", small_data, *network, "-o", tmp_path / "a.safetensors")
    done = command("train-fcn", "--data", small_data, "--qat", tmp_path / "a.safetensors", "--crop", "64x64", "--batch",
                   "2", "--epochs", "1", "--rate", "1e-4", "-o", tmp_path / "b.safetensors")  # fmt: skip
    assert "rounded as in INT8" in done.stdout
    first, second = (load_checkpoint(tmp_path / f"{name}.safetensors") for name in "ab")
    assert first.model.architecture == second.model.architecture and first.card == second.card
    said = one_error(command("train-fcn", "--qat", tmp_path / "x.safetensors", "-o", tmp_path / "c.safetensors", ok=2))
    assert "does not exist" in said
