"""Refined labels: those of the guided filter as it is defined, whatever the tiles; and networks that have none."""

import json
from dataclasses import replace

import numpy as np
import pytest
from fcn_deploy.runtime import network
from fcn_deploy.runtime.engine_format.stage import Upsampling
from fcn_deploy.runtime.errors import MisuseError
from fcn_deploy.runtime.head import refine as refining
from fcn_deploy.runtime.head.refine import CLOSE, EPSILON, NEAR, REACH, box_filter, refined_labels, refusal
from fcn_deploy.runtime.head.upsampling import labels_from_scores
from fcn_deploy.runtime.planning.grid import Grid
from fcn_deploy.runtime.tiling.tiles import ready_windows, score_bands
from helpers import command, one_error, photo, save_photos, window
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fcn_deploy import ModelCard, Segmenter

LINEAR = Upsampling("linear", "half_pixel", (8.0, 8.0))


def card(classes=4, channels=3, **values):
    values = {"mean": (127.5,) * channels, "std": (60.0,) * channels} | values
    names = tuple(f"class {index}" for index in range(classes))
    return ModelCard(names, channels=channels, stride=8, size_multiple=32, **values)


def reference(scores, image, stride):
    """Slopes added, pixel by pixel in double precision; and how far the best class is from the next."""
    scores, image = scores.astype(np.float64), image.astype(np.float64) / 255
    classes, high, wide = scores.shape

    def window(y, x):
        places = [(np.clip(y + i, 0, high - 1), np.clip(x + j, 0, wide - 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        return tuple(np.array(places).T)

    beyond = [(0, max(0, side * stride - pixels)) for side, pixels in zip((high, wide), image.shape, strict=False)]
    edge = np.pad(image, (*beyond, (0, 0)), mode="edge")[: high * stride, : wide * stride]
    guide = edge.reshape(high, stride, wide, stride, -1).mean((1, 3))
    raw = np.zeros((high, wide, guide.shape[2], classes))
    for y in range(high):
        for x in range(wide):
            colors, found = guide[window(y, x)], scores[:, *window(y, x)].T
            spread = np.cov(colors.T, bias=True).reshape(guide.shape[2], -1) + EPSILON * np.eye(guide.shape[2])
            raw[y, x] = np.linalg.solve(spread, (colors - colors.mean(0)).T @ found / 9)
    slopes = np.array([[raw[window(y, x)].mean(0) for x in range(wide)] for y in range(high)])
    best = scores.argmax(0)
    possible = {}
    unsure = np.inf  # how far any class is from being possible, or not
    for y in range(high):
        for x in range(wide):
            near = set(best[max(0, y - NEAR) : y + NEAR + 1, max(0, x - NEAR) : x + NEAR + 1].flat) - {best[y, x]}
            lead = {
                other: scores[other, y, x]
                - scores[best[y, x], y, x]
                + CLOSE * np.abs(slopes[y, x, :, other] - slopes[y, x, :, best[y, x]]).sum()
                for other in near
            }
            unsure = min([unsure, *(abs(by) for by in lead.values())])
            possible[y, x] = {best[y, x], *(other for other, by in lead.items() if by >= 0)}
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    soft = sum(
        (2 - abs(i)) * (2 - abs(j)) / 16 * padded[1 + i : 1 + i + len(image), 1 + j : 1 + j + image.shape[1]]
        for i in (-1, 0, 1)
        for j in (-1, 0, 1)
    )
    labels, margin = np.zeros(image.shape[:2], int), np.full(image.shape[:2], np.inf)
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            y, x = (row + 0.5) / stride - 0.5, (column + 0.5) / stride - 0.5
            spots = [(int(np.floor(y)) + i, int(np.floor(x)) + j) for i in (0, 1) for j in (0, 1)]
            weights = [(1 - abs(y - i)) * (1 - abs(x - j)) for i, j in spots]
            spots = [(min(max(i, 0), high - 1), min(max(j, 0), wide - 1)) for i, j in spots]
            winners = sorted(set().union(*(possible[spot] for spot in spots)))
            values = sum(
                weight * (scores[:, *spot] + (soft[row, column] - guide[spot]) @ slopes[spot])
                for weight, spot in zip(weights, spots, strict=True)
            )[winners]
            labels[row, column] = winners[values.argmax()]
            if len(winners) > 1:
                margin[row, column] = np.diff(np.sort(values)[-2:])[0]
    return labels, margin if unsure > 1e-4 else np.zeros_like(margin)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_labels_are_those_of_the_definition(data):
    stride, channels = data.draw(st.sampled_from([2, 3, 8])), data.draw(st.sampled_from([1, 3]))
    size = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    cells = [-(-side // stride) + data.draw(st.integers(0, 2)) for side in size]  # padding beyond the image
    random = np.random.default_rng(data.draw(st.integers(0, 999)))
    scores = (2 * random.normal(size=(4, *cells))).astype(np.float32)
    image = random.integers(0, 256, (*size, channels), np.uint8)
    head = Upsampling("linear", "half_pixel", (float(stride),) * 2)
    labels = refined_labels(window(scores, size, size), head, card(channels=channels), stride, image)
    expected, margin = reference(scores, image, stride)
    assert labels.dtype == np.uint8 and labels.shape == size
    assert (labels == expected)[margin > 1e-3].all()


def test_borders_are_found_in_the_image():
    y, x = np.mgrid[:121, :147]
    truth = (np.hypot(y - 60, x - 70) < 37).astype(np.uint8)
    image = np.where(truth[:, :, None] == 1, (200, 90, 40), (60, 120, 160)).astype(np.uint8)
    share = np.pad(truth, ((0, 7), (0, 13)), mode="edge").reshape(16, 8, 20, 8).mean((1, 3))
    scores = np.stack([1 - share, share]).astype(np.float32) * 6
    two = card(2)
    plain = (scores.argmax(0).repeat(8, 0).repeat(8, 1)[:121, :147] != truth).sum()
    wrong = (refined_labels(window(scores, truth.shape, truth.shape), LINEAR, two, 8, image) != truth).sum()
    assert wrong < 0.1 * plain
    # Of a network of one score, a logit or a probability, the same; and of one that takes its softmax itself.
    one = scores[1:] - scores[:1]
    expected = refined_labels(window(scores, truth.shape, truth.shape), LINEAR, two, 8, image)
    for activation, given_scores in (("sigmoid", one), ("probability", 1 / (1 + np.exp(-one)))):
        labels = refined_labels(
            window(given_scores, truth.shape, truth.shape), LINEAR, replace(two, activation=activation), 8, image
        )
        assert (labels != expected).mean() < 1e-3
    likely = np.stack([1 - 1 / (1 + np.exp(-one[0])), 1 / (1 + np.exp(-one[0]))])
    labels = refined_labels(window(likely, truth.shape, truth.shape), replace(LINEAR, activated=True), two, 8, image)
    assert (labels != expected).mean() < 1e-3


def test_things_that_no_colour_shows_are_kept():
    y, x = np.mgrid[:120, :120]
    for radius in (9, 12, 30):
        truth = (np.hypot(y - 60, x - 60) < radius).astype(np.uint8)
        share = truth.reshape(15, 8, 15, 8).mean((1, 3))
        scores = np.stack([1 - share, share]).astype(np.float32) * 6
        plain = labels_from_scores(window(scores, (120, 120), (120, 120)), LINEAR, card(2)).sum()
        found = refined_labels(
            window(scores, (120, 120), (120, 120)), LINEAR, card(2), 8, np.full((120, 120, 3), 90, np.uint8)
        )
        assert 0.99 * plain <= found.sum() <= 1.01 * plain


def test_scores_at_the_threshold_are_below_it():
    image = np.zeros((32, 32, 3), np.uint8)
    for threshold, score in ((0.3, 0.3), (1e-7, 1e-8), (0.5, 0.5)):
        one = card(2, activation="probability", threshold=threshold)
        for offset, label in ((0, 0), (1e-3, 1)):
            scores = np.full((1, 4, 4), score + offset, np.float32)
            plain = labels_from_scores(window(scores, (32, 32), (32, 32)), LINEAR, one)
            assert (plain == label).all()
            np.testing.assert_array_equal(
                refined_labels(window(scores, (32, 32), (32, 32)), LINEAR, one, 8, image), plain
            )


def test_of_equal_scores_the_first_stands():
    """Scores with a floor, as of a ReLU: beside what is found all are equal, and no colour may choose among them."""
    random = np.random.default_rng(0)
    one = np.zeros((1, 12, 20), np.float32)
    one[0, 4:8, 8:12] = 3
    many = np.maximum(random.normal(size=(12, 12, 20)).astype(np.float32) - 1.5, 0)
    size = (96, 160)
    for scores, model in ((one, card(2, activation="sigmoid")), (many, card(12))):
        plain = labels_from_scores(window(scores, size, size), LINEAR, model)
        for grey in (17, 90, 200):
            labels = refined_labels(window(scores, size, size), LINEAR, model, 8, np.full((*size, 3), grey, np.uint8))
            assert (labels != plain).mean() < 0.01
    noise = random.integers(0, 256, (*size, 3), np.uint8)
    labels = refined_labels(window(one, size, size), LINEAR, card(2, activation="sigmoid"), 8, noise)
    assert not labels[:24].any() and not labels[:, :56].any() and labels[40:56, 72:88].all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_change_labels_beside_them_alone(value):
    random = np.random.default_rng(0)
    scores = random.normal(size=(300, 30, 20)).astype(np.float32)
    image, many = random.integers(0, 256, (240, 160, 3), np.uint8), card(300)
    clean = refined_labels(window(scores, (240, 160), (240, 160)), LINEAR, many, 8, image)
    broken = random.random(scores.shape) < 2e-5
    scores[broken] = value
    whole = refined_labels(window(scores, (240, 160), (240, 160)), LINEAR, many, 8, image)
    around = box_filter(broken.any(0).astype(np.float32), REACH) > 0
    assert 0.1 < around.mean() < 0.9
    assert (whole == clean)[~around.repeat(8, 0).repeat(8, 1)].all()
    # Nor does it matter which rows are wanted, however many are no numbers.
    scores[random.random(scores.shape) < 1e-3] = value
    whole = refined_labels(window(scores, (240, 160), (240, 160)), LINEAR, many, 8, image)
    for rows in ((0, 40), (64, 72), (120, 130)):
        labels = refined_labels(window(scores, (240, 160), (240, 160), rows), LINEAR, many, 8, image)
        np.testing.assert_array_equal(labels, whole[slice(*rows)])


@pytest.mark.parametrize("which", [0, 1])
def test_a_class_that_is_ruled_out_wins_as_little_as_without_refining(which):
    random = np.random.default_rng(0)
    scores = box_filter(random.normal(size=(2, 12, 20)).astype(np.float32)) * 6
    scores[which, 3:, 10:] = -np.inf
    plain = labels_from_scores(window(scores, (96, 160), (96, 160)), LINEAR, card(2))
    labels = refined_labels(
        window(scores, (96, 160), (96, 160)), LINEAR, card(2), 8, np.full((96, 160, 3), 90, np.uint8)
    )
    assert 0.2 < (plain == which).mean() < 0.8 and (labels != plain).mean() < 1e-3
    noise = random.integers(0, 256, (96, 160, 3), np.uint8)
    labels = refined_labels(window(scores, (96, 160), (96, 160)), LINEAR, card(2), 8, noise)
    assert not (labels == which)[28:, 84:].any()


def test_images_of_other_kinds():
    scores = np.random.default_rng(0).normal(size=(4, 8, 12)).astype(np.float32)
    image = photo(60, 90)
    expected = refined_labels(window(scores, (60, 90), (60, 90)), LINEAR, card(), 8, image)
    spread = (255 / refining.SPREAD,) * 3
    for dtype, factor in (("float32", (1, 1, 1)), ("uint16", (257, 257, 257)), ("float32", (1, 1, 1000))):
        other = card(
            dtype=dtype, std=np.multiply(spread, factor).tolist(), mean=np.multiply((127.5,) * 3, factor).tolist()
        )
        labels = refined_labels(
            window(scores, (60, 90), (60, 90)), LINEAR, other, 8, image.astype(dtype) * np.array(factor, dtype)
        )
        assert (labels != expected).mean() < 1e-3
    # What marks missing values disturbs nothing beyond the cells that it is in.
    for missing in (np.nan, np.inf, -3.4e38, -9999):
        holes = image.astype(np.float32)
        holes[:, 64:] = missing
        labels = refined_labels(window(scores, (60, 90), (60, 90)), LINEAR, card(dtype="float32", std=spread), 8, holes)
        np.testing.assert_array_equal(labels[:, :32], expected[:, :32])
    # Channels that are no colours: by brightness.
    grey = refined_labels(window(scores, (60, 90), (60, 90)), LINEAR, card(channels=1), 8, image[:, :, :1])
    four = np.repeat(image[:, :, :1], 4, 2)
    assert (refined_labels(window(scores, (60, 90), (60, 90)), LINEAR, card(channels=4), 8, four) != grey).mean() < 1e-3
    many = np.zeros((300, 8, 12), np.float32)
    many[:4] = scores + 9
    labels = refined_labels(window(many, (60, 90), (60, 90)), LINEAR, card(300), 8, image)
    assert labels.dtype == np.uint16 and labels.max() < 4


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_and_blocks_change_no_label(data):
    cells = data.draw(st.integers(1, 12)) * 4, data.draw(st.integers(1, 5)) * 4
    size = tuple(8 * side - data.draw(st.integers(0, 31)) for side in cells)
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    scores = random.normal(size=(4, *cells)).astype(np.float32)
    image = random.integers(0, 256, (*size, 3), np.uint8)
    whole = refined_labels(window(scores, size, size), LINEAR, card(), 8, image)
    padded = tuple(8 * side for side in cells)
    grid = Grid(padded, (32 * data.draw(st.integers(1, 4)), 8 * cells[1]), (0, 0))
    start = data.draw(st.integers(0, size[0] - 1))

    def first(rows, columns):
        return scores[:, rows.outer_start // 8 : rows.outer_stop // 8]

    bands = score_bands([grid], [(8, 8)], first, [], max(0, start - 8 * (2 + REACH)))
    done = start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refining, "BLOCK", 1)
        patch.setattr(refining, "LEAST_BLOCK", data.draw(st.integers(1, 20)))
        for part in ready_windows(bands, 8, LINEAR, padded, size, start, REACH):
            assert part.rows[0] == done
            labels = refined_labels(part, LINEAR, card(), 8, image)
            np.testing.assert_array_equal(labels, whole[slice(*part.rows)])
            done = part.rows[1]
    assert done == size[0]


def test_tiles_bands_and_streams_give_the_labels_of_the_whole_image(exports, monkeypatch):
    image = photo(500, 410)
    with Segmenter(exports / "narrow.engine", refine=True) as net, Segmenter(exports / "narrow.engine") as plain:
        expected = net(image)
        assert 0.001 < (expected != plain(image)).mean() < 0.5
        scores = net.network.scores(image)
        np.testing.assert_array_equal(
            expected,
            refined_labels(
                window(scores, image.shape[:2], image.shape[:2]), net.network.upsampling, net.card, 8, image
            ),
        )
        soft = plain.probabilities(image)
        np.testing.assert_array_equal(net.probabilities(image), soft)
        sizes = [(1, 1), (1, 300), (33, 7), (500, 410), (64, 64)] * 3
        for size, labels in zip(sizes, net.map(image[:h, :w] for h, w in sizes), strict=True):
            np.testing.assert_array_equal(labels, net(image[: size[0], : size[1]]))
    with Segmenter(exports / "narrow.engine", memory=6_000_000, refine=True) as net:
        assert net.plan(500, 410).grids
        np.testing.assert_array_equal(net(image), expected)
        for start in (0, 7, 250, 499):
            labels = np.concatenate([band for _, band in net.bands(image, start)])
            np.testing.assert_array_equal(labels, expected[start:])
        monkeypatch.setattr(network, "BAND_BYTES", 410 * 21 * 5)  # a few rows at a time
        tops, both = zip(*net.network.bands_of(image, 3, "labels", "probabilities"), strict=True)
        assert len(tops) > 50 and tops[0] == 3
        for index, whole in enumerate((expected[3:], soft[:, 3:])):
            found = np.concatenate([band[index] for band in both], axis=-2)
            np.testing.assert_array_equal(found, whole)


COARSE = {"mode": "linear", "factor": (8.0, 8.0)}


@pytest.mark.parametrize(
    ("how", "values", "reason"),
    [
        (COARSE, {"activation": "multilabel"}, "gives masks"),
        (COARSE, {"activation": "none"}, "gives values"),
        ({"mode": "none"}, {}, "full-size"),
        ({"mode": "nearest", "factor": (8.0, 8.0)}, {}, "nearest"),
        (COARSE | {"coordinates": "align_corners"}, {}, "align_corners"),
        (COARSE | {"coordinates": "asymmetric"}, {}, "asymmetric"),
        (COARSE | {"factor": (8.0, 4.0)}, {}, "8×4"),
        (COARSE | {"factor": (2.5, 2.5)}, {}, "2.5×2.5"),
        (COARSE | {"factor": None}, {"size_multiple": 4}, "multiples of 4, and its scores stand 8 pixels apart"),
    ],
)
def test_networks_that_cannot_be_refined_are_told_why(how, values, reason):
    assert reason in refusal(replace(card(), **values), Upsampling(**how), (8, 8))


def test_networks_that_can_be_refined():
    for how in (COARSE, COARSE | {"factor": None}, COARSE | {"coordinates": "pytorch_half_pixel", "activated": True}):
        assert refusal(card(), Upsampling(**how), (8, 8)) is None


def test_commands_refine(exports, tmp_path):
    engine = exports / "narrow.engine"
    save_photos(tmp_path, [(90, 70), (1, 1), (200, 33)])
    command("infer", engine, tmp_path, "-o", tmp_path / "out", "--refine", "--memory", "0.006")
    with Segmenter(engine, refine=True) as net:
        for index in range(3):
            labels = np.asarray(Image.open(tmp_path / "out" / f"{index}.png"))
            np.testing.assert_array_equal(labels, net(np.asarray(Image.open(tmp_path / f"{index}.png"))))
    said = one_error(
        command("infer", exports / "narrow.onnx", tmp_path / "0.png", "-o", tmp_path / "x", "--refine", ok=2)
    )
    assert "full-size" in said and "build-engine" in said and not (tmp_path / "x").exists()
    with pytest.raises(MisuseError, match="cannot be refined"):
        Segmenter(exports / "narrow.onnx", refine=True)


@pytest.mark.slow
def test_refined_labels_are_evaluated_beside_the_others(exports, tmp_path):
    for folder in ("val", "valannot"):
        (tmp_path / folder).mkdir()
    for index, size in enumerate([(90, 70), (40, 130)]):
        image = photo(*size, seed=index)
        Image.fromarray(image).save(tmp_path / "val" / f"{index}.png")
        Image.fromarray(image[:, :, 0] // 60).save(tmp_path / "valannot" / f"{index}.png")
    (tmp_path / "classes.txt").write_text("\n".join("abcde"))
    names = exports / "narrow.safetensors", exports / "narrow.engine"
    page = tmp_path / "r.html"
    done = command("eval-fcn", *names, "--data", tmp_path, "--refine", "--json", "--report", page)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert ["refined" in record["kind"] for record in records] == [False, False, True]
    assert records[2]["labels_as_first"] < records[1]["labels_as_first"]
    assert "narrow.engine --refine" in page.read_text()
    assert "is no engine" in one_error(command("eval-fcn", names[0], "--data", tmp_path, "--refine", ok=2))
