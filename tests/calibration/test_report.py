"""report.html: its numbers are the metrics, what is foreign in it stays text, and browsers open it without a word."""

import io
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from browser import Browser
from fcn_deploy.calibration.metrics import IGNORE, Metrics, confusion_matrix
from fcn_deploy.calibration.report import page
from fcn_deploy.calibration.report.accuracy_sections import classes_table, grouped, scales_table, stages_table
from fcn_deploy.calibration.report.charts import Series, line_chart, linear_ticks, log_ticks
from fcn_deploy.calibration.report.engine_report import REPORT_VERSION, EngineReport
from fcn_deploy.calibration.report.layout import in_points, percent
from fcn_deploy.calibration.report.results import MIXED, OWN, About, Entry, Evaluated, Example, ImageResult
from helpers import ReadPage
from PIL import Image

from fcn_deploy import ModelCard

HOSTILE = ("<script>alert(1)</script>", "\"onload='alert(2)'", "a & b", "</style></title><img src=http://x.test/a.png>")
REPORT = {
    "target": "cpu", "precision": "int8", "head": "linear", "stride": 8, "size_multiple": 32,
    "stages": [
        {"halo": [32, 32], "tiles": "exact", "bytes_per_pixel": 153.6, "output_bytes": 0.62, "work": 0.3},
        {"halo": None, "tiles": "none: GlobalAveragePool", "bytes_per_pixel": 24.0, "output_bytes": 0.7, "work": 0.7},
    ],
    "miou": 0.61, "miou_reason": None, "threads": "one per core", "machine": "x86_64, 2 cores",
    "notes": ["its <b>padding</b> was taken off"],
    "agreement": {"sizes": ["1x1", "7x13"], "pixels": 92, "labels_equal": 1.0, "undecided": 0.0, "wrong": 0},
    "accuracy": {
        "calibration_images": 30, "images_judged": 9, "judged_unseen": True, "skipped": {"x": "x.png is damaged"},
        "method": "mse", "metric": "mIoU", "float32": 0.6123, "int8": 0.6101, "drop_points": 0.22, "max_drop": 0.5,
        "layers": 30, "kept": {"conv_7": "reverted: the accuracy budget was exceeded"},
        "by_backend": {"onnxruntime": 0.6101, "openvino": 0.6099},
    },
    "layers": [
        {"name": f"conv_{i}", "operator": "Conv", "sensitivity": 1e-3 * (i + 1), "kept": "reverted" if i == 7 else ""}
        for i in range(30)
    ],
    "backend": "onnxruntime",
    "candidates": [
        {"backend": "onnxruntime", "precision": "int8", "threads": "one per core", "rounds": [9, 9], "refused": None,
         "latency_ms": {"256x256": 6.231, "4000x4000": None}, "against_chosen": 1.0, "chosen": True},
        {"backend": "openvino", "precision": "int8", "threads": "one per core", "rounds": [], "latency_ms": {},
         "refused": "0.71 points of mIoU lost by its kernels", "against_chosen": None, "chosen": False},
    ],
    "latency_ms": {"256x256": 6.231, "480x640": 15.851, "4000x4000": None}, "speedup": 2.04,
    "core_bytes": {"float32": 13490729, "int8": 3808129},
}  # fmt: skip


def labelled(classes: int, sizes, seed: int = 0, right: float = 0.8, absent=()):
    """Random (reference, predicted) of these sizes, some pixels not counted."""
    rng = np.random.default_rng(seed)
    for height, width in sizes:
        reference = rng.integers(0, classes, (height, width))
        reference[np.isin(reference, absent)] = next(i for i in range(classes) if i not in absent)
        predicted = np.where(rng.random(reference.shape) < right, reference, rng.integers(0, classes, (height, width)))
        reference[:2] = IGNORE
        yield reference, predicted


def result_of(name, reference, predicted, classes, seconds=0.01):
    confusion = confusion_matrix(reference, predicted, classes)
    return ImageResult(
        name, reference.shape, np.diag(confusion), confusion.sum(1), confusion.sum(0), seconds
    ), confusion


def evaluated(classes=4, sizes=((20, 30), (31, 17), (64, 64)), right=0.8, equal=None, absent=(), scales=()):
    results, total, examples = {OWN: []}, np.zeros((classes, classes), np.int64), []
    for index, (reference, predicted) in enumerate(labelled(classes, sizes, 0, right, absent)):
        name = f"{index}<i>.png"
        result, confusion = result_of(name, reference, predicted, classes, 0.01 * (index + 1))
        results[OWN].append(result)
        total += confusion
        photo = np.full((*reference.shape, 3), 90, np.uint8)
        examples.append(Example(result, photo, reference.astype(np.uint8), predicted.astype(np.uint8)))
    for scale in scales:
        results[scale] = [replace(result, size=(result.size[0] * 2 + 1, result.size[1])) for result in results[OWN]]
    return Evaluated(total, results, tuple(examples), equal)


def entries(classes=4, names=HOSTILE, report=REPORT, **options):
    names = [*names, *(f"class {index}" for index in range(len(names), classes))][:classes]
    card = ModelCard(tuple(names), stride=8, size_multiple=32)
    return [
        Entry("net.safetensors", "PyTorch checkpoint, float32", 13_700_000, card, None, evaluated(classes, **options)),
        Entry(
            "net<8>.engine", "engine for cpu, int8, onnxruntime", 3_800_000, card, EngineReport.from_dict(report),
            evaluated(classes, right=0.7, equal=0.9999999, **options),
        ),
    ]  # fmt: skip


ABOUT = About(
    'net & "others"', "3 images of x (val)", "2026-01-01 12:00 UTC", {"processor": "<abacus>"},
    ["x.onnx <u>has</u> no model card"], "eval-fcn 'a b.engine'",
)  # fmt: skip


def test_the_numbers_are_those_of_the_metrics():
    models = entries(scales=("0.5", "2", MIXED))
    read = ReadPage(page.page(ABOUT, models))
    stages = read.tables["Each model on the same images, at their own sizes"]
    for entry, row in zip(models, stages[1:], strict=True):
        m = entry.evaluated.metrics
        four = [m.pixel_accuracy, m.mean_accuracy, m.mean_iou, m.frequency_weighted_iou]
        assert row[0] == entry.name and row[2:6] == [f"{value:.4f}" for value in four]
    first, last = (entry.evaluated for entry in models)
    lost = (first.metrics.mean_iou - last.metrics.mean_iou) * 100
    assert stages[2][6:] == [f"−{lost:.2f}", "> 99.999 %", "3.8", "20.0"]
    classes = read.tables["By class, in label order"]
    for index, row in enumerate(classes[1:]):
        assert row[0] == HOSTILE[index]
        assert row[2:4] == [f"{metrics.class_iou[index]:.4f}" for metrics in (first.metrics, last.metrics)]
        assert row[5] == f"{last.metrics.class_accuracy[index]:.4f}"
    matrix = next(rows for caption, rows in read.tables.items() if caption.startswith("Percent of the pixels"))
    shares = last.confusion / last.confusion.sum(1, keepdims=True) * 100
    assert [row[1:] for row in matrix[1:]] == [[f"{value:.1f}" for value in row] for row in shares]
    wrong = read.tables["The largest confusions"][1]
    off = last.confusion - np.diag(np.diag(last.confusion))
    a, b = np.unravel_index(off.argmax(), off.shape)
    assert wrong[:3] == [HOSTILE[a], HOSTILE[b], f"{off[a, b]:,}"]
    scales = read.tables["Accuracy and time where the same images come at other sizes"]
    assert [row[0] for row in scales[1:]] == ["own size", "0.5×", "2×", "mixed odd sizes"]
    assert "3 sizes" in scales[1][1] and scales[1][2] == f"{first.metrics.mean_iou:.4f}"
    sizes = read.tables["By size, the smallest first"]
    assert [row[:2] for row in sizes[1:]] == [["31×17", "1"], ["20×30", "1"], ["64×64", "1"]]
    assert sizes[3][2] == f"{first.results[OWN][2].metrics.mean_iou:.4f}"
    # The same tables on a terminal.
    assert f"{first.metrics.mean_iou:.4f}" in stages_table(models).text()
    assert "0.5×" in scales_table(models).text() and HOSTILE[0] in classes_table(models).text()


def test_what_an_engine_reports_is_on_the_page():
    read = ReadPage(page.page(About("e"), [entries()[1]]))
    assert read.tables["What low precision cost"][1:] == [
        ["float32", "0.6123", "–"], ["int8", "0.6101", "−0.22"],
        ["int8, by onnxruntime", "0.6101", "−0.22"], ["int8, by openvino", "0.6099", "−0.24"],
    ]  # fmt: skip
    candidates = read.tables["Candidates, measured side by side when it was built"]
    assert candidates[1][3:] == ["6.23", "–", "1.00", "chosen"] and "refused: 0.71 points" in candidates[2][-1]
    layers = read.tables["The layers that low precision hurts, the most sensitive first"]
    assert [row[0] for row in layers[1:3]] == ["conv_29", "conv_28"] and len(layers) == 21
    more = read.tables["The layers that low precision hurts, the most sensitive first, continued"]
    assert len(more) == 11 and ["conv_7", "reverted"] in [[row[0], row[-1]] for row in more]
    tiles = read.tables["Receptive field and tiles"]
    assert tiles[1][2] == "32×32" and tiles[2][1:3] == ["none: GlobalAveragePool", "–"]
    assert read.tables["When built, on the machine that built it"][3] == ["4000×4000", "too large"]
    assert "net<8>.engine: skipped in calibration: x.png is damaged" in read.text
    assert "30 images by mse; 1 image could not be read" in read.text and "2.04 times faster" in read.text


def test_engines_of_masks_and_values_are_told_of_too():
    values = {"kind": "values", "sizes": ["1x1"], "pixels": 9, "difference": 2e-7}
    card = ModelCard(("depth",), activation="none")
    html = page.page(
        About("e"), [Entry("e.engine", "engine", 9, card, EngineReport.from_dict({**REPORT, "agreement": values}))]
    )
    read = ReadPage(html)
    assert ["values against the model’s, float32", "differ by 2.0e-07 of their range at most, at 1 sizes"] in (
        read.tables["The engine"]
    )
    assert ["an image’s result", "values, as they are"] in read.tables["Model card"]
    masks = ModelCard(("a", "b"), activation="multilabel", threshold=(0.5, 0.25), whole="ReduceMean")
    rows = ReadPage(
        page.page(About("e"), [Entry("e.engine", "engine", 9, masks, EngineReport.from_dict(REPORT))])
    ).tables["Model card"]
    assert ["an image’s result", "a mask per class, by sigmoid above 0.5, 0.25"] in rows
    assert ["sees the whole image", "yes: ReduceMean"] in rows and "not as this release" not in html


def test_what_was_not_measured_has_no_box_and_says_why():
    card = ModelCard(("a", "b"))
    report = {key: value for key, value in REPORT.items() if key not in ("accuracy", "layers", "candidates", "speedup")}
    report |= {"latency_ms": None, "latency_reason": "no GPU here", "miou": None, "miou_reason": "no labels were given"}
    html = page.page(About("e"), [Entry("e.engine", "engine", 9_000_000, card, EngineReport.from_dict(report))])
    assert "not measured: no GPU here" in html and "not measured: no labels were given" in html
    read = ReadPage(html)
    assert set(read.tables) == {
        "The engine", "Receptive field and tiles", "Model card", "Classes, in label order",
        "Where and when this page was made",
    }  # fmt: skip
    assert "chart" not in {attributes.get("class") for _, attributes in read.tags}
    unranked = {key: value for key, value in REPORT.items() if key != "layers"}
    read = ReadPage(page.page(About("e"), [Entry("e.engine", "engine", 9, card, EngineReport.from_dict(unranked))]))
    assert "Layers were not ranked" in read.text
    assert read.tables["1 of 30 layers are kept in higher precision"][1][0] == "conv_7"


def test_names_from_elsewhere_stay_text():
    html = page.page(ABOUT, entries())
    read = ReadPage(html)
    assert "script" not in {tag for tag, _ in read.tags}
    for tag, attributes in read.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert tag in ("a", "img", "link") or not {"src", "href"} & set(attributes)
        address = attributes.get("src") or attributes.get("href") or "#"
        assert address.startswith(("#", "data:")), address
    assert {tag for tag, _ in read.tags}.isdisjoint({"u", "i", "b", "abacus", "8"})
    for text in (*HOSTILE, "0<i>.png", "net<8>.engine", "x.onnx <u>has</u> no model card", "<abacus>", ABOUT.title):
        assert text in read.text, text
    assert "its <b>padding</b> was taken off" in read.text


@pytest.mark.parametrize(
    "broken",
    [
        {}, {"latency_ms": [1, 2]}, {"latency_ms": {"a": 1}}, {"latency_ms": {"4x4": math.inf}}, {"stages": 7},
        {"accuracy": {"int8": "<b>"}}, {"layers": [{"name": 1}]}, {"layers": [{"sensitivity": "x"}]}, {"speedup": 0},
        {"candidates": "none"},
        {"notes": 3}, {"agreement": {"sizes": [], "pixels": 1}}, {"builder": {"profiles": []}},
        {"core_bytes": {"int8": "many"}},
    ],
)  # fmt: skip
def test_a_report_json_of_another_make_leaves_the_rest_of_the_page(broken):
    report = {**REPORT, **broken} if broken else {}
    read = ReadPage(page.page(ABOUT, entries(report=report)))
    assert read.tables["Each model on the same images, at their own sizes"]
    assert "is not as this release writes it" in read.text


def test_a_report_is_read_as_it_was_written():
    report = EngineReport.from_dict(REPORT)
    assert report.problems == () and report.version is None  # of before it had one
    assert report.stages[0].halo == (32, 32) and report.stages[0].tile is None and report.smallest is None
    assert report.layers[7].kept == "reverted" and report.candidates[0].latency_ms["4000x4000"] is None
    assert report.agreement.kind == "labels" and (report.accuracy.precision, report.accuracy.value) == ("int8", 0.6101)
    again = EngineReport.from_json(replace(report, version=REPORT_VERSION).to_json())
    assert again == replace(report, version=REPORT_VERSION) and again.problems == ()


@pytest.mark.parametrize("text", ["", "[1]", "null", "{", '"a"', "[" * 100_000, b"\xff"])
def test_what_is_no_report_is_none(text):
    assert EngineReport.from_json(text) is None


def test_a_report_of_a_later_release_is_read_as_far_as_it_is_known():
    later = {**REPORT, "version": 99, "problems": ["x"], "sparsity": 0.5}
    later["agreement"] = {**REPORT["agreement"], "kinds": ["labels"]}
    report = EngineReport.from_dict(later)
    assert (report.version, report.problems, report.agreement.pixels) == (99, (), 92)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("stride", 8.5), ("stride", True), ("stride", "8"), ("target", 1), ("stages", [{}]), ("speedup", math.nan),
        ("stages", [{**REPORT["stages"][0], "halo": [1, 2, 3]}]), ("threads", 1.5), ("layers", [["conv"]]),
        ("accuracy", {k: v for k, v in REPORT["accuracy"].items() if k != "int8"}), ("core_bytes", [1]),
        ("latency_ms", {"0x4": 1.0}), ("float32_latency_ms", {"4x4": -1}),
    ],
)  # fmt: skip
def test_a_part_that_is_not_as_written_is_left_out_and_said(part, value):
    report = EngineReport.from_dict({**REPORT, part: value})
    assert getattr(report, part) in (None, ()) and [each.partition(":")[0] for each in report.problems] == [part]
    assert report.miou == 0.61 and "\n" not in report.problems[0]


def test_a_layer_that_breaks_the_network_is_on_the_page():
    layer = {"name": "a", "operator": "Conv", "sensitivity": math.inf, "kept": "reverted"}
    html = page.page(ABOUT, entries(report={**REPORT, "layers": [*REPORT["layers"], layer]}))
    read = ReadPage(html)
    assert read.tables["The layers that low precision hurts, the most sensitive first"][1][2] == "inf"
    assert 'width="inf"' not in html and 'width="nan"' not in html


def test_classes_that_are_absent_are_said_and_not_counted():
    models = entries(absent=(1, 2))
    read = ReadPage(page.page(About("e"), models))
    assert "2 classes are absent from the labels, and no mean counts them:" in read.text
    assert "Means are over the 2 of 4 classes that the labels hold." in read.text
    row = read.tables["By class, in label order"][2]
    assert row[2:4] == ["absent", "absent"] and row[4:6] == ["–", "–"]
    nothing = evaluated(absent=())
    blank = [replace(result, hits=result.hits * 0, total=result.total * 0) for result in nothing.results[OWN]]
    void = replace(nothing, confusion=nothing.confusion * 0, results={OWN: blank}, worst=())
    read = ReadPage(page.page(About("e"), [replace(models[0], evaluated=void)]))
    assert "hold no counted pixel" in read.text and "nan" not in read.text.lower()


@pytest.mark.parametrize("classes", [2, 150])
def test_the_page_serves_two_classes_and_a_hundred_and_fifty(classes, tmp_path):
    page.write(tmp_path / "r.html", ABOUT, entries(classes, names=(), sizes=((90, 120), (50, 50))))
    html = (tmp_path / "r.html").read_text()
    matrix = next(
        rows for caption, rows in ReadPage(html).tables.items() if caption.startswith("Percent of the pixels")
    )
    assert len(matrix) == classes + 1 and {len(row) for row in matrix} == {classes + 1}
    assert len(html) < 2_500_000
    assert page.page(ABOUT, entries(classes, names=(), sizes=((90, 120), (50, 50)))) == html  # equal data, equal bytes


def test_numbers_are_written_as_they_are():
    assert in_points(-0.00001) == "0.00" and in_points(0.0123) == "+1.23" and in_points(math.nan) == "–"
    assert percent(0.999999, 2) == "> 99.99 %" and percent(1.0, 2) == "100.00 %" and percent(None, 2) == "–"
    assert linear_ticks([0.58, 0.67]) == [0.58, 0.6, 0.62, 0.64, 0.66, 0.68]
    assert linear_ticks([0.5]) and log_ticks(1, 1) and log_ticks(0.3, 4)[0] == 0.2
    ticks = log_ticks(1e-3, 1e5)
    assert ticks[0] <= 1e-3 and ticks[-1] >= 1e5 and len(ticks) < 12
    svg = line_chart([Series("<a>", ((1, 2),))], "a \"title'", "x", "y")
    assert "<a>" not in svg and "nan" not in svg and "&lt;a&gt;" in svg
    sizes = [(i + 1, 7) for i in range(30)]
    results = [ImageResult("x", size, *[np.ones(2, int)] * 3, 0.1) for size in reversed(sizes)]
    groups = grouped(results, 10)
    assert len(groups) == 10 and [r.size for group in groups for r in group] == sizes


def test_metrics_of_counts_are_those_of_the_matrix():
    confusion = np.random.default_rng(0).integers(0, 50, (5, 5))
    counts = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    assert Metrics.of(confusion) == Metrics.of_counts(*counts)


CONTRAST = """
(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const known = new Map();
  const rgb = colour => {
    if (!known.has(colour)) {
      canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
      known.set(colour, [...canvas.getImageData(0, 0, 1, 1).data]);
    }
    return known.get(colour);
  };
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(v => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const low = new Map();
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !element.checkVisibility() || element.closest('title')) continue;
    const style = getComputedStyle(element);
    let behind = element, back = rgb(getComputedStyle(behind).backgroundColor);
    while (back[3] < 255 && behind.parentElement) {
      behind = behind.parentElement; back = rgb(getComputedStyle(behind).backgroundColor);
    }
    const front = rgb(element instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) low.set(element.className + ' ' + element.tagName, ratio);
  }
  return [...low].map(([name, ratio]) => name + ' ' + ratio.toFixed(2));
})()
"""


@pytest.mark.slow
def test_a_browser_opens_it_at_every_width_in_light_and_dark(tmp_path):
    page.write(tmp_path / "r.html", ABOUT, entries(scales=("0.5", "2")))
    page.write(tmp_path / "many.html", ABOUT, entries(150, sizes=((90, 120), (50, 50))))
    with Browser() as browser:
        for name in ("r.html", "many.html"):
            for scheme in ("light", "dark"):
                for width in (1280, 390):
                    browser.open(tmp_path / name, width=width, scheme=scheme)
                    asked = [url for url in browser.requests() if not url.startswith("data:")]
                    assert asked == [(tmp_path / name).as_uri()]
                    assert browser.complaints() == []
                    assert browser.value("document.scrollingElement.scrollWidth") <= width, (name, width)
                    picture = np.asarray(Image.open(io.BytesIO(browser.screenshot(False))).convert("RGB"))
                    assert picture.shape[1] == width and picture.std() > 10
                    assert (picture[0, 0].mean() > 128) == (scheme == "light")
                assert browser.value(CONTRAST) == [], scheme
            # All images decoded, charts drawn, and each table, picture and chart named for those who do not see it.
            assert browser.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
            assert browser.value("[...document.images].every(image => image.alt.length > 5)")
            assert browser.value("document.images.length") == 4 * (3 if name == "r.html" else 2)
            charts = browser.value(
                "[...document.querySelectorAll('svg[role=img]')].map(svg => "
                "[svg.getAttribute('aria-label').length > 20, svg.getBoundingClientRect().width > 300, "
                "svg.querySelectorAll('polyline').length])"
            )
            assert charts == ([[True, True, 2], [True, True, 3]] if name == "r.html" else [[True, True, 3]])
            tables = "[...document.querySelectorAll('table')]"
            assert browser.value(f"{tables}.every(table => table.caption && table.querySelector('th[scope=row]'))")
            targets = "[...document.querySelectorAll('nav a')].every(link => document.querySelector(link.hash))"
            assert browser.value(targets)
        pdf = browser.pdf()
        assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 2
