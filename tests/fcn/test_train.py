"""Training, resuming, checkpoints and evaluation."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from fcn_deploy.calibration.digits import Digits
from fcn_deploy.fcn import train as training
from fcn_deploy.fcn.augment import augment
from fcn_deploy.fcn.checkpoint import load_checkpoint, save_checkpoint
from fcn_deploy.fcn.cli.train_fcn import _progress
from fcn_deploy.fcn.recipes import RECIPES, Recipe, named
from fcn_deploy.fcn.train import segmentation_loss, soft_jaccard_loss, train
from helpers import checkpoint_of, command, one_error, random_network
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fcn_deploy import DeployError, MisuseError, ModelCard

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


def test_turned_samples_are_the_image_in_all_its_orientations():
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    labels = image[:, :, 0] // 128
    orientations = {}
    for seed in range(60):
        random = np.random.default_rng(seed)
        sample, wanted = augment(image, labels, CARD, (32, 32), random, scale=(1, 1), turn=True, brightness=0)
        pixels = sample.numpy().transpose(1, 2, 0).astype(np.uint8)
        np.testing.assert_array_equal(pixels[:, :, 0] // 128, wanted)
        orientations[pixels.tobytes()] = pixels
    expected = {np.rot90(side, k).tobytes() for side in (image, image[:, ::-1]) for k in range(4)}
    assert set(orientations) == expected
    sample, wanted = augment(image, labels, CARD, (32, 48), np.random.default_rng(3), turn=True)
    assert sample.shape == (3, 32, 48) and wanted.shape == (32, 48)


def test_colour_and_blur_change_pixels_and_keep_what_they_must():
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    labels = image[:, :, 0] // 128

    def sample(image, seed=0, **changes):
        return augment(image, labels, CARD, (32, 32), np.random.default_rng(seed), scale=(1, 1), flip=False,
                       brightness=0, **changes)  # fmt: skip

    plain, wanted = sample(image)
    for changes in ({"color": 0.5}, {"blur": 1.0}):
        changed, same = sample(image, **changes)
        assert torch.equal(same, wanted) and not torch.allclose(changed, plain, atol=5)
    blurred = sample(image, blur=1.0)[0]
    assert blurred[:, 8:-8, 8:-8].std() < 0.6 * plain.std() and torch.allclose(blurred.mean(), plain.mean(), rtol=0.05)
    flat = np.full((32, 32, 3), 90, np.uint8)
    torch.testing.assert_close(sample(flat, blur=1.0)[0], torch.full((3, 32, 32), 90.0))
    # A share of the samples is blurred.
    share = np.mean([not torch.equal(sample(image, seed, blur=0.3)[0], plain) for seed in range(100)])
    assert 0.15 < share < 0.45


class KilledError(Exception):
    """Stands for a run that is killed after an epoch."""


def run(out, epochs=3, resume=False, stop_after=None, seed=0, recipe=None, judged=3, **card):
    """Train a narrow network on a few small canvases."""
    checkpoint = checkpoint_of(random_network(seed, classes=11, backbone="mobilenet-v2", width=0.125), **card)
    sizes = ((64, 96), (97, 61), (40, 40))

    def on_epoch(record):
        if record["epoch"] == stop_after:
            raise KilledError

    recipe = recipe or Recipe(epochs=epochs, batch=4, crop=(64, 64), flip=False)
    data, validation = Digits("train", count=10, sizes=sizes), Digits("val", count=judged, sizes=sizes)
    return train(checkpoint, data, validation, recipe, out, resume=resume, on_epoch=on_epoch)


EVERYTHING = Recipe(
    epochs=4, batch=4, crop=(64, 64), flip=True, turn=True, color=0.3, blur=0.5, backbone_rate=0.3, schedule="cosine",
    ema=0.9, class_weights="sqrt", jaccard=0.5, hardest=0.5, validate_every=3, name="everything",
)  # fmt: skip


def timeless(records):
    return [{key: value for key, value in record.items() if "seconds" not in key} for record in records]


def log_of(out):
    return [json.loads(line) for line in training.log_path(out).read_text().splitlines()]


@pytest.mark.parametrize("recipe", [None, EVERYTHING], ids=["default", "everything"])
def test_a_run_killed_midway_resumes_to_the_same_result(tmp_path, recipe):
    whole = run(tmp_path / "whole.safetensors", recipe=recipe)
    with pytest.raises(KilledError):
        run(tmp_path / "cut.safetensors", stop_after=2, recipe=recipe)
    assert (tmp_path / "cut.safetensors.state").exists() and len(log_of(tmp_path / "cut.safetensors")) == 3
    resumed = run(tmp_path / "cut.safetensors", resume=True, recipe=recipe)
    assert timeless(whole.history) == timeless(resumed.history)
    first, second = (load_checkpoint(tmp_path / f"{name}.safetensors").model.state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    head, *records = log_of(tmp_path / "cut.safetensors")
    assert head["recipe"]["name"] == ("everything" if recipe else "default") and head["recipe"]["rate"] == 3e-3
    assert records == resumed.history and timeless(records) == timeless(log_of(tmp_path / "whole.safetensors")[1:])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cut.log.jsonl", "cut.safetensors", "whole.log.jsonl", "whole.safetensors",
    ]  # fmt: skip
    if recipe:
        assert [record["val_miou"] is not None for record in records] == [False, False, True, True]
        assert load_checkpoint(tmp_path / "cut.safetensors").training["recipe"]["hardest"] == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["save_checkpoint", "save_state", "write_log"])
def test_a_run_killed_while_it_writes_loses_nothing(tmp_path, monkeypatch, writer):
    recipe = Recipe(epochs=3, batch=4, crop=(32, 32), ema=0.5, rate=1e-3)
    out = tmp_path / "x.safetensors"
    calls, write = [], getattr(training, writer)

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 3:
            # As a power cut would: some bytes under a temporary name, and nothing tidied up.
            (tmp_path / ".x-0123.state").write_bytes(b"half")
            raise KilledError
        write(*arguments)

    if writer == "save_checkpoint":  # every epoch is better than the one before
        mious = iter((0.1, 0.2, 0.3, 0.3))
        of = training.Metrics.of

        def better(confusion):
            return dataclasses.replace(of(confusion), mean_iou=next(mious))

        monkeypatch.setattr(training.Metrics, "of", better)
    monkeypatch.setattr(training, writer, killed)
    with pytest.raises(KilledError):
        run(out, recipe=recipe)
    monkeypatch.setattr(training, writer, write)
    load_checkpoint(out)
    resumed = run(out, recipe=recipe, resume=True)
    assert [record["epoch"] for record in log_of(out)[1:]] == [1, 2, 3] and log_of(out)[1:] == resumed.history
    assert load_checkpoint(out).training["epoch"] == resumed.best_epoch
    assert not out.with_name(out.name + ".state").exists()


def test_the_average_is_validated_and_kept_with_statistics_of_its_own(tmp_path):
    plain = Recipe(epochs=1, batch=4, crop=(32, 32), flip=False)
    run(tmp_path / "plain.safetensors", recipe=plain)
    run(tmp_path / "ema.safetensors", recipe=dataclasses.replace(plain, ema=0.999))
    kept = {name: load_checkpoint(tmp_path / f"{name}.safetensors").model.state_dict() for name in ("plain", "ema")}
    start = random_network(0, classes=11, backbone="mobilenet-v2", width=0.125).state_dict()
    for name, tensor in kept["ema"].items():
        if tensor.is_floating_point() and not torch.equal(tensor, start[name]):
            # Between where it began and where training went: for statistics as for weights.
            assert not torch.equal(tensor, kept["plain"][name]), name
    moved = [name for name in start if "running_mean" in name and not torch.equal(kept["ema"][name], start[name])]
    assert moved


def test_the_average_is_the_decayed_sum_of_what_training_passed_through():
    model = torch.nn.BatchNorm1d(2)
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = torch.ones(2)
    for step in range(40):
        with torch.no_grad():
            model.weight.copy_(torch.tensor([float(step), -1.0]))
            model.num_batches_tracked += 1
        training._follow(average, model, 0.8, step)
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight
    torch.testing.assert_close(average["weight"], expected)
    assert average["num_batches_tracked"] == 40
    with training._holding(model, average):
        torch.testing.assert_close(model.weight, expected)
    assert model.weight.tolist() == [39, -1]


def test_losses_are_those_of_their_definitions():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 6, 5), torch.randint(0, 3, (2, 6, 5))  # class 3 is absent
    labels[0, :2] = 255
    counted = labels != 255
    each = torch.nn.functional.cross_entropy(logits, labels, ignore_index=255, reduction="none")[counted]
    torch.testing.assert_close(segmentation_loss(logits, labels, Recipe()), each.mean())
    hard = each.sort(descending=True).values[: round(0.25 * len(each))]
    torch.testing.assert_close(segmentation_loss(logits, labels, Recipe(hardest=0.25)), hard.mean())
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    weighted = (each * weights[labels[counted]]).sum() / weights[labels[counted]].sum()
    for recipe in (Recipe(), Recipe(hardest=0.99999)):
        torch.testing.assert_close(segmentation_loss(logits, labels, recipe, weights), weighted)
    share = logits.softmax(1).transpose(0, 1)[:, counted]
    ious = []
    for k in range(3):
        own = labels[counted] == k
        hits = share[k][own].sum()
        ious.append(hits / (share[k].sum() + own.sum() - hits))
    torch.testing.assert_close(soft_jaccard_loss(logits, labels), 1 - torch.stack(ious).mean())
    both = segmentation_loss(logits, labels, Recipe(jaccard=0.5))
    torch.testing.assert_close(both, each.mean() + 0.5 * soft_jaccard_loss(logits, labels))
    # Perfect answers cost nothing, and neither does a batch without a counted pixel.
    perfect = torch.nn.functional.one_hot(torch.where(counted, labels, 0), 4).permute(0, 3, 1, 2) * 100.0
    assert segmentation_loss(perfect, labels, Recipe(jaccard=1.0)) < 1e-4
    for recipe in (Recipe(jaccard=1.0), Recipe(hardest=0.1)):
        void = segmentation_loss(logits.requires_grad_(), torch.full_like(labels, 255), recipe)
        assert void == 0
        void.backward()
        assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "poly"])
def test_rates_rise_and_fall_and_the_backbones_is_its_share(schedule):
    recipe = Recipe(epochs=10, schedule=schedule, rate=0.01, backbone_rate=0.1)
    optimizer, scheduler = training._optimizer(random_network(width=0.125), recipe, 10)
    rates = []
    for _ in range(100):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    head, backbone = np.array(rates).T
    np.testing.assert_allclose(backbone, 0.1 * head)
    top = head.argmax()
    assert head.max() == pytest.approx(0.01) and head[0] < 0.005 and head[-1] < 0.03 * head.max()
    assert (np.diff(head[: top + 1]) > 0).all() and (np.diff(head[top:]) <= 0).all()


def test_the_last_epochs_are_always_validated():
    recipe = Recipe(epochs=43, validate_every=10)
    assert [epoch for epoch in range(1, 44) if recipe.validates(epoch)] == [10, 20, 30, 40, 41, 42, 43]
    assert [epoch for epoch in range(1, 4) if Recipe(epochs=3, validate_every=9).validates(epoch)] == [3]


def test_a_validation_that_takes_longer_than_training_is_said_once(capsys):
    """26 megapixels take 25 s to validate and 2.5 s to train on."""
    record = {"loss": 1, "val_miou": 0.5, "seconds": 27.5, "val_seconds": 25.0, "best": False}
    with _progress(Recipe(epochs=30)) as (_, on_epoch):
        for epoch in (1, 2):
            on_epoch(record | {"epoch": epoch})
    said = capsys.readouterr().err
    assert said.count("validation took 25.0 s and the training before it 2.5 s") == 1
    assert "--validate-every 10 they would" in said and len(said.splitlines()) == 1
    with _progress(Recipe(epochs=30, validate_every=10)) as (_, on_epoch):
        for epoch in range(1, 10):
            on_epoch(record | {"epoch": epoch, "val_miou": None, "seconds": 2.5, "val_seconds": 0.0})
        on_epoch(record | {"epoch": 10})
    with _progress(Recipe(epochs=2)) as (_, on_epoch):
        on_epoch(record | {"epoch": 1, "seconds": 0.3, "val_seconds": 0.2})
    assert capsys.readouterr().err == ""


def test_resuming_needs_something_to_resume_and_the_same_recipe(tmp_path):
    with pytest.raises(MisuseError, match=r"no .*state to resume"):
        run(tmp_path / "x.safetensors", resume=True)
    with pytest.raises(KilledError):
        run(tmp_path / "x.safetensors", stop_after=1)
    with pytest.raises(MisuseError, match="another recipe: its epochs differ"):
        run(tmp_path / "x.safetensors", epochs=9, resume=True)
    with pytest.raises(MisuseError, match="another meaning of images and classes: its mean differ"):
        run(tmp_path / "x.safetensors", resume=True, mean=(1.0, 2.0, 3.0))
    with pytest.raises(MisuseError, match="another set of images"):
        run(tmp_path / "x.safetensors", resume=True, judged=4)
    (tmp_path / "x.safetensors.state").write_bytes(b"junk")
    with pytest.raises(DeployError, match="damaged"):
        run(tmp_path / "x.safetensors", resume=True)


def test_training_lowers_the_loss_and_keeps_the_best_epoch(tmp_path):
    recipe = Recipe(epochs=6, batch=4, crop=(64, 64), flip=False, class_weights="sqrt", rate=5e-3)
    progress = run(tmp_path / "x.safetensors", recipe=recipe)
    losses = [record["loss"] for record in progress.history]
    assert losses[-1] < 0.85 * losses[0]  # 0.6 to 0.75, by the number of threads
    best = max(progress.history, key=lambda record: record["val_miou"])
    assert best["epoch"] == progress.best_epoch
    assert load_checkpoint(tmp_path / "x.safetensors").training["epoch"] == progress.best_epoch


def test_it_stops_early_where_nothing_gets_better(tmp_path):
    recipe = Recipe(epochs=30, batch=4, crop=(32, 32), flip=False, patience=1, rate=1e-9)
    assert len(run(tmp_path / "x.safetensors", recipe=recipe).history) < 30
    # Not before the epochs in between are judged.
    recipe = dataclasses.replace(recipe, validate_every=3, epochs=20)
    assert len(run(tmp_path / "y.safetensors", recipe=recipe).history) == 6


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
                        ({"class_weights": "some"}, "some"), ({"batch": 1}, "batch is 1"), ({"ema": 1.0}, "ema is 1"),
                        ({"rate": float("nan")}, "rate is nan"), ({"hardest": 0}, "hardest is 0"),
                        ({"crop_scale": (2.0, 0.5)}, "crop scale 2.0 to 0.5"), ({"schedule": "step"}, "step"),
                        ({"jaccard": -1}, "jaccard is -1"), ({"color": 2}, "color is 2"), ({"blur": -1}, "blur is -1"),
                        ({"backbone_rate": 0}, "backbone rate is 0"), ({"weight_decay": -1}, "weight decay is -1"),
                        ({"validate_every": 0}, "validate every is 0")):  # fmt: skip
        with pytest.raises(MisuseError, match=said):
            Recipe(**wrong)


def test_a_named_recipe_is_changed_by_what_is_given():
    assert named("camvid") == RECIPES["camvid"] and named("camvid").name == "camvid"
    changed = named("camvid", epochs=3, rate=None, flip=False)
    assert (changed.epochs, changed.flip, changed.rate, changed.name) == (3, False, RECIPES["camvid"].rate, "camvid")
    assert not RECIPES["digits"].flip and dataclasses.replace(RECIPES["digits"], flip=True, name="default") == Recipe()
    with pytest.raises(MisuseError, match=r"recipe 'imagenet'; choose one of default, digits, camvid, "):
        named("imagenet")


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_recipes_are_listed_and_given_options_win(small_data, tmp_path):
    told = " ".join(command("train-fcn", "--help").stdout.split())
    assert all(f"{name}: " in told for name in RECIPES if name != "default") and "jaccard 0.5" in told
    out = tmp_path / "m.safetensors"
    options = ("--data", small_data, "--backbone", "mobilenet-v2", "--width", "0.125", "--recipe", "camvid-short", "-o",
               out, "--crop", "32x64", "--batch", "2", "--epochs", "2", "--crop-scale",
               "0.9,1.1", "--no-flip")  # fmt: skip
    done = command("train-fcn", *options)
    assert "recipe camvid-short: epochs 2, batch 2, crop 32x64" in done.stdout and "no flip" in done.stdout
    assert "log: " in done.stdout and "digit 0" not in done.stderr
    head, first, last = log_of(out)
    wanted = named("camvid-short", epochs=2, batch=2, crop=(32, 64), crop_scale=(0.9, 1.1), flip=False)
    assert head["recipe"] == json.loads(json.dumps(dataclasses.asdict(wanted)))
    assert load_checkpoint(out).training["recipe"] == head["recipe"]
    assert first["val_miou"] is None and set(last["val_class_iou"]) == set(Digits("train").classes)
    # The log of a run is no more overwritten than its checkpoint.
    out.unlink()
    assert "m.log.jsonl exists already" in one_error(command("train-fcn", *options, ok=2))


@pytest.mark.slow
def test_labels_are_checked_before_training_starts(small_data, tmp_path):
    root = shutil.copytree(small_data, tmp_path / "data")
    options = ("--data", root, "--backbone", "mobilenet-v2", "--width", "0.125", "--crop", "32x32", "--batch", "2",
               "--epochs", "1", "-o", tmp_path / "m.safetensors")  # fmt: skip
    last = root / "valannot" / "4.png"
    labels = np.array(Image.open(last))
    for wrong, said in ((labels[:-1], "labels must have their image's size"),
                        (np.full_like(labels, 11), r"4.png holds class 11, and there are 11 classes")):  # fmt: skip
        Image.fromarray(wrong).save(last)
        done = command("train-fcn", *options, ok=1)
        assert said in one_error(done) and "epoch" not in done.stdout
    for name in "01234":
        Image.fromarray(np.zeros((1, 1), np.uint8)).resize(Image.open(root / "val" / f"{name}.png").size).save(
            root / "valannot" / f"{name}.png"
        )
    done = command("train-fcn", *options)
    assert "val has labels of 'background' alone, and a network that never finds another class has" in done.stderr
    assert "over a single class, which says nothing of the others → " in done.stdout
    assert log_of(tmp_path / "m.safetensors")[1]["val_class_iou"]["digit 0"] is None


@pytest.mark.slow
def test_masks_of_0_and_255_are_asked_about_and_never_the_best(tmp_path):
    for name in ("train", "val"):
        for folder in (name, f"{name}annot"):
            (tmp_path / "data" / folder).mkdir(parents=True)
        for index in range(3):
            image, mask = np.full((40, 48, 3), 30, np.uint8), np.zeros((40, 48), np.uint8)
            image[8 + index : 30, 10:40], mask[8 + index : 30, 10:40] = 220, 255
            Image.fromarray(image).save(tmp_path / "data" / name / f"{index}.png")
            Image.fromarray(mask).save(tmp_path / "data" / f"{name}annot" / f"{index}.png")
    out = tmp_path / "m.safetensors"
    options = ("--data", tmp_path / "data", "--backbone", "mobilenet-v2", "--width", "0.125", "--crop", "32x32",
               "--batch", "2", "--epochs", "1", "-o", out)  # fmt: skip
    asked = one_error(command("train-fcn", *options, ok=2))
    assert "255 is not counted, so only 'class 0' is left; pass --mask-values 0,255 where 255 is 'class 1'" in asked
    done = command("train-fcn", *options, "--mask-values", "0=sky,1=forest", ok=2)
    assert "add 255=CLASS to --mask-values" in one_error(done) and not out.exists()
    told = ("--mask-values", "0=background,255=cell")
    done = command("train-fcn", *options, *told)
    assert "single class" not in done.stdout and load_checkpoint(out).card.classes == ("background", "cell")
    assert log_of(out)[1]["val_class_iou"].keys() == {"background", "cell"}
    assert "hold the values 0 and 255 alone" in one_error(command("eval-fcn", out, "--data", tmp_path / "data", ok=2))
    judged = json.loads(command("eval-fcn", out, "--data", tmp_path / "data", *told, "--json").stdout)
    assert judged["class_iou"][1] is not None
    void = ("--mask-values", "0=background,255=void")
    done = command("eval-fcn", out, "--data", tmp_path / "data", *void)
    assert "WARNING: val has labels of 'background' alone" in done.stderr
    assert "(one class is present: the means say nothing of how others are found)" in done.stdout


@pytest.mark.slow
def test_eval_misuse_is_one_line(exports, small_data, tmp_path):
    assert "does not exist" in one_error(command("eval-fcn", tmp_path / "x.engine", ok=2))
    done = command("eval-fcn", exports / "narrow.engine", "--data", small_data, ok=2)
    assert "has 11 classes and the model has 5" in one_error(done)
    assert "has 11 classes and" in one_error(command("eval-fcn", exports / "narrow.onnx", ok=2))


def test_quantization_aware_training_rounds_as_the_engines_do(tmp_path):
    from fcn_deploy.export.quantization.round_weights import PAIR_LIMIT
    from fcn_deploy.fcn.quantization import WEIGHT_STEPS, fake_quantized, fake_weight

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
        with fake_quantized(model):
            assert not torch.equal(model(x), plain)
        assert torch.equal(model(x), plain)  # and nothing of it stays


@pytest.mark.slow
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
