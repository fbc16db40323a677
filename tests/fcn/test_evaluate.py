"""eval-fcn: several models on the same images, at their own and at other sizes, and its page."""

import json

import numpy as np
import pytest
from fcn_deploy.calibration.datasets import load_dataset
from fcn_deploy.calibration.metrics import IGNORE, Metrics
from fcn_deploy.calibration.report.results import MIXED, OWN, metrics_of
from fcn_deploy.fcn.evaluate import (
    evaluate,
    evaluate_in_detail,
    open_model,
    parse_scales,
    resized,
    same_classes,
    size_at,
)
from fcn_deploy.runtime.errors import MisuseError
from helpers import command, one_error, photo
from PIL import Image

from fcn_deploy import ModelCard

SIZES = ((40, 60), (60, 40), (33, 71), (80, 80), (1, 9), (64, 64), (101, 47))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five classes, of which class 3 is absent, at seven sizes; a corner of each label is not counted."""
    root = tmp_path_factory.mktemp("mixed")
    for folder in ("val", "valannot"):
        (root / folder).mkdir()
    for index, size in enumerate(SIZES):
        image = photo(*size, seed=index)
        labels = (image[:, :, 0] // 86 + (image[:, :, 1] > 128)).astype(np.uint8)
        labels[labels == 3] = 4
        labels[:1, :1] = IGNORE
        Image.fromarray(image).save(root / "val" / f"{index}.png")
        Image.fromarray(labels).save(root / "valannot" / f"{index}.png")
    (root / "classes.txt").write_text("\n".join(f"class {index}" for index in range(5)))
    return root


def test_models_are_evaluated_on_the_same_images(exports, data, tmp_path):
    names = [exports / f"narrow.{suffix}" for suffix in ("safetensors", "onnx", "engine")]
    page = tmp_path / "r.html"
    options = ("--data", data, "--image-scales", "0.5,1,mixed", "--report", page, "--json")
    done = command("eval-fcn", *names, *options)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["file"] for record in records] == [str(name) for name in names]
    first = records[0]
    assert first["labels_as_first"] is None and first["images"] == len(SIZES)
    assert list(first["scales"]) == ["1", "0.5", "mixed"] and first["scales"]["1"]["mean_iou"] == first["mean_iou"]
    assert first["class_iou"][3] is None
    for record in records[1:]:
        assert record["labels_as_first"] > 0.999 and abs(record["mean_iou"] - first["mean_iou"]) < 1e-3
        assert record["milliseconds"] > 0 and record["bytes"] > 1000
    html = page.read_text()
    for record, name in zip(records, names, strict=True):
        assert name.name in html and f"{record['mean_iou']:.4f}" in html and record["kind"] in html
    assert "How narrow.engine was built" in html and "class is absent from the labels" in html
    # Again without --force: refused before anything is evaluated, and as it was.
    assert "exists already" in one_error(command("eval-fcn", names[2], "--data", data, "--report", page, ok=2))
    assert page.read_text() == html
    shown = command("eval-fcn", *names[1:], "--data", data, "--count", "3", "--image-scales", "2").stdout
    assert "narrow.onnx" in shown and "class 4" in shown and "2×" in shown and "(means are over the 4 classes" in shown
    assert max(map(len, shown.splitlines())) <= 110  # headers and what runs a model in lines, not 170 columns
    (line,) = [line for line in shown.splitlines() if line.startswith("narrow.engine")]
    assert line.count("0.") >= 4, "the numbers of a model are in one line"


def test_what_is_measured_is_what_evaluate_counts(exports, data):
    model = open_model(exports / "narrow.engine")
    images = load_dataset(str(data), "val", card=model.card)
    labels: list[bytes] = []
    found = evaluate_in_detail(model.predict, images, 5, [OWN, "2", MIXED], labels, worst=3)
    confusion = evaluate(model.predict, images, 5)
    assert (found.confusion == confusion).all()
    assert repr(metrics_of(found.results[OWN])) == repr(
        Metrics.of(confusion)
    )  # NaN of the absent class is no NaN's equal
    assert [result.size for result in found.results[OWN]] == list(SIZES)
    assert [result.size for result in found.results["2"]] == [(2 * height, 2 * width) for height, width in SIZES]
    mixed = [result.size for result in found.results[MIXED]]
    assert all(height % 2 and width % 2 for height, width in mixed) and mixed != list(SIZES)
    # The worst are the worst, each with its own pictures.
    order = sorted((r.metrics.mean_iou, i) for i, r in enumerate(found.results[OWN]) if r.total.any())
    assert [example.result.name for example in found.worst] == [f"{i}.png" for _, i in order[:3]]
    for example in found.worst:
        assert example.photo.shape[:2] == example.reference.shape == example.predicted.shape == example.result.size
    # A model beside itself differs nowhere; one that is wrong somewhere is told so.
    again = evaluate_in_detail(model.predict, images, 5, first=labels)
    assert found.equal is None and again.equal == 1.0
    other = evaluate_in_detail(lambda image: np.zeros(image.shape[:2], np.uint8), images, 5, first=labels)
    total = sum(height * width for height, width in SIZES)
    zeros = sum(int((model.predict(images[i][0]) == 0).sum()) for i in range(len(images)))
    assert other.equal == zeros / total


def test_labels_are_resized_as_their_images_are():
    """A network that makes no mistakes has mIoU 1 at every scale, if its labels lie where its image does."""
    image, labels = np.zeros((40, 60, 3), np.uint8), np.zeros((40, 60), np.uint8)
    image[10:20, 30:50], labels[10:20, 30:50] = 255, 1
    for scale in ("0.5", "0.75", "1", "1.5", "2", MIXED):
        height, width = size_at(scale, 40, 60, 3)
        small, wanted = resized(image, labels, height, width)
        assert small.shape == (height, width, 3) and wanted.shape == (height, width)
        differ = (small[:, :, 0] > 127) != wanted
        assert differ.mean() < 0.03  # of the border's pixels, some
        if scale == "2":
            assert not differ.any()
    bands = np.arange(6 * 8 * 4, dtype=np.uint16).reshape(6, 8, 4)
    small, _ = resized(bands, np.zeros((6, 8), np.uint8), 3, 4)
    assert small.dtype == np.uint16 and small.shape == (3, 4, 4) and bands.min() < small.mean() < bands.max()
    assert size_at("0.05", 7, 9, 0) == (1, 1)


def test_scales_are_parsed_or_refused():
    assert parse_scales("0.5, 0.750,1.0,2,mixed") == ["1", "0.5", "0.75", "2", "mixed"]
    for wrong in ("0", "-1", "nan", "big", "1,100", "1e9"):
        with pytest.raises(MisuseError, match="scale"):
            parse_scales(wrong)


def test_models_of_other_classes_are_not_compared():
    ab, ba, unnamed = ModelCard(("a", "b")), ModelCard(("b", "a")), ModelCard(("class 0", "class 1"))
    paths = ["x.onnx", "y.engine"]
    assert [card.classes for card in same_classes(paths, [unnamed, ab])] == [("a", "b"), ("a", "b")]
    with pytest.raises(MisuseError, match=r"class 0 is 'b' of y.engine and 'a' of x.onnx"):
        same_classes(paths, [ab, ba])
    with pytest.raises(MisuseError, match=r"y.engine has 3 classes and x.onnx has 2"):
        same_classes(paths, [ab, ModelCard(("a", "b", "c"))])


@pytest.mark.slow
def test_misuse_is_one_line_and_leaves_nothing(exports, data, tmp_path):
    engine, page = exports / "narrow.engine", tmp_path / "r.html"
    for words, code, said in (
        (("--report", tmp_path / "r.pdf"), 2, "not named .html"),
        (("--report", tmp_path), 2, "not named .html"),
        (("--report", "/proc/nowhere/r.html"), 1, "cannot write"),
        (("--report", page, "--image-scales", "0"), 2, "scale '0'"),
    ):
        assert said in one_error(command("eval-fcn", engine, "--data", data, *words, ok=code))
    # Data that is wrong midway: no page, and the one that was there stays.
    broken = tmp_path / "data"
    for folder in ("val", "valannot"):
        (broken / folder).mkdir(parents=True)
    labels = np.zeros((9, 9), np.uint8)
    Image.fromarray(photo(9, 9)).save(broken / "val" / "a.png")
    Image.fromarray(photo(9, 9)).save(broken / "val" / "b.png")
    Image.fromarray(labels).save(broken / "valannot" / "a.png")
    page.write_text("mine")
    options = ("--data", broken, "--report", page, "--force")
    assert "has no label" in one_error(command("eval-fcn", engine, *options, ok=1))
    (broken / "val" / "b.png").rename(tmp_path / "b.png")
    Image.fromarray(labels).save(broken / "valannot" / "c.png")
    done = command("eval-fcn", engine, "--data", broken, "--report", tmp_path / "one.html")
    assert "left out, 1 in" in done.stderr and "valannot: c.png" in (tmp_path / "one.html").read_text()
    (tmp_path / "one.html").unlink()
    (broken / "valannot" / "c.png").unlink()
    (tmp_path / "b.png").rename(broken / "val" / "b.png")
    Image.fromarray(labels[:8]).save(broken / "valannot" / "b.png")
    assert "is 8×9 and" in one_error(command("eval-fcn", engine, *options, ok=1))
    Image.fromarray(labels + 7).save(broken / "valannot" / "b.png")
    assert "holds class 7" in one_error(command("eval-fcn", engine, *options, ok=1))
    assert page.read_text() == "mine" and {path.name for path in tmp_path.iterdir()} == {"r.html", "data"}
