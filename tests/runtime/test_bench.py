"""bench-engine: any size, engines and plain models, figures that add up, and errors in one line."""

import json
from collections import Counter
from itertools import count

import numpy as np
import pytest
from fcn_deploy.runtime.bench import _mixed, _weights, bench, bench_engine, show
from fcn_deploy.runtime.network import Network
from fcn_deploy.runtime.sizes import Sizes, parse_sizes
from helpers import command, one_error, save_photos

from fcn_deploy import DeployError, MisuseError


def run(*words):
    return json.loads(command("bench-engine", *words, "--seconds", "0.2", "--json").stdout)


@pytest.mark.parametrize("kind", ["engine", "onnx"])
def test_every_size_is_measured(exports, kind):
    report = run(exports / f"narrow.{kind}", "--sizes", "37x61,1x1,1x300,130x90", "--threads", "1")
    assert report["target"] == "cpu" and report["backend"] and report["threads"] == 1
    rows = report["sizes"]
    assert [row["size"] for row in rows] == [[1, 1], [1, 300], [37, 61], [130, 90]]
    for row in rows:
        height, width = row["size"]
        assert 0 < row["median_ms"] <= row["p90_ms"] and row["runs"] >= 3 and row["source"] == "noise"
        assert row["images_per_s"] == pytest.approx(1e3 / row["median_ms"], rel=0.02)
        assert row["megapixels_per_s"] == pytest.approx(row["images_per_s"] * height * width / 1e6, rel=0.02, abs=1e-3)
        assert sum(row["share"].values()) == pytest.approx(1, abs=1e-3) and min(row["share"].values()) >= 0
        assert row["peak_mb"] > 0
    peaks = [row["peak_mb"] for row in rows]
    assert peaks == sorted(peaks)
    memory = report["memory_mb"]
    assert memory["opened"] > 0 and memory["after"] <= memory["peak"] and peaks[-1] <= memory["peak"]
    assert report["mixed"]["images"] >= 4 and report["mixed"]["images_per_s"] > 0


def test_memory_is_what_the_images_need(exports):
    """A 1-megapixel image needs its activations, hundreds of bytes a pixel; the image itself is not counted."""
    small, large = (
        run(exports / "narrow.engine", "--sizes", size)["memory_mb"]["peak"] for size in ("32x32", "1000x1000")
    )
    assert 15 < large - small < 500


def test_the_peak_is_never_below_what_was_seen(exports, monkeypatch):
    """Linux adds its counts up now and then only: its mark of the highest may fall, and lie below the present."""
    highest = iter([300_000_000, 299_000_000, 298_000_000])
    resident = iter([200_000_000, 250_000_000, 310_000_000])
    figures = {"VmHWM": highest}  # the network, which asks too, is told nothing
    monkeypatch.setattr(
        "fcn_deploy.runtime.process_memory._status", lambda field: next(figures[field]) if field in figures else None
    )
    monkeypatch.setattr("fcn_deploy.runtime.bench.resident", lambda: next(resident))
    report = bench(exports / "narrow.engine", parse_sizes("32x32,40x40"), seconds=0.01)
    assert [row["peak_mb"] for row in report["sizes"]] == [100, 100]
    assert report["memory_mb"] == {"opened": 50, "peak": 110, "after": 110}


def test_a_folders_images_are_measured_each_as_often_as_it_comes(exports, tmp_path):
    save_photos(tmp_path, [(40, 60)] * 3 + [(100, 80)])
    (tmp_path / "broken.png").write_bytes(b"junk")
    report = run(exports / "narrow.engine", "--sizes", tmp_path)
    assert [(row["size"], row["images"]) for row in report["sizes"]] == [([40, 60], 3), ([100, 80], 1)]
    assert report["sizes"][0]["source"] == str(tmp_path / "0.png")


def test_many_sizes_are_stood_for_by_a_few():
    sizes = Sizes(Counter({(side, 10): side for side in range(1, 101)}))
    chosen = sizes.examples(5)
    weights = _weights(sizes, chosen, chosen)
    assert len(weights) == 5 and sum(weights.values()) == sum(range(1, 101))
    assert weights[chosen[-1]] > weights[chosen[1]] > weights[chosen[0]]


def test_the_mixed_run_draws_by_weight_and_takes_every_size():
    ticks, seen = count(), Counter()
    images = {(1, 1): np.zeros((1, 1, 3)), (2, 2): np.zeros((2, 2, 3)), (3, 3): np.zeros((3, 3, 3))}
    weights = {(1, 1): 80, (2, 2): 20, (3, 3): 0}
    mixed = _mixed(lambda image: seen.update([image.shape[:2]]), images, weights, 3000.0, lambda: float(next(ticks)))
    assert seen[3, 3] == 1 and 2 < seen[1, 1] / seen[2, 2] < 8
    assert mixed["images"] == seen.total() and mixed["median_ms"] == 1000 and mixed["images_per_s"] == 1
    pixels = sum(number * height * width for (height, width), number in seen.items())
    assert mixed["megapixels_per_s"] == pytest.approx(pixels / seen.total() / 1e6, abs=1e-3)


def test_layers_add_up(exports):
    report = run(exports / "narrow.engine", "--sizes", "64x64,256x256", "--layers")
    layers = report["layers"]["rows"]
    assert report["layers"]["size"] == [256, 256] and sum("Conv" in layer["operator"] for layer in layers) > 40
    total, call = sum(layer["ms"] for layer in layers), report["sizes"][1]["median_ms"]
    assert 0.05 * call < total < 20 * call
    text = show(report)
    assert f"layers at 256x256: {total:.2f} ms in {len(layers)} of them" in text and "the 15 longest" in text
    assert command("bench-engine", exports / "narrow.onnx", "--sizes", "64x64", "--seconds", "0.1", "--layers").stdout


def test_layers_of_gpu_engines_are_not_invented(exports, monkeypatch):
    from dataclasses import replace

    opened = Network.__init__

    def for_gpu(self, *args, **words):
        opened(self, *args, **words)
        self.manifest = replace(self.manifest, target="sm89")

    monkeypatch.setattr(Network, "__init__", for_gpu)
    report = bench(exports / "narrow.engine", parse_sizes("32x32"), seconds=0.1, layers=True)
    assert "sm89" in report["layers"]["reason"] and "rows" not in report["layers"]
    assert "layers: not timed" in show(report)


def test_a_size_beyond_the_memory_is_said_to_be_so(exports, monkeypatch):
    opened = Network.__init__
    monkeypatch.setattr(Network, "__init__", lambda self, *a, **k: opened(self, *a, **{**k, "memory": 2_000_000}))
    report = bench(exports / "narrow.engine", parse_sizes("32x32,900x900"), seconds=0.1)
    small, large = report["sizes"]
    assert small["median_ms"] and large["median_ms"] is None and "900" in large["reason"]
    assert report["mixed"]["images"] >= 1 and "not run" in show(report)


def test_the_text_has_a_line_for_each_size(exports):
    text = command("bench-engine", exports / "narrow.engine", "--sizes", "1x1,40x50", "--seconds", "0.1").stdout
    assert text.count(" ms ") >= 4 and "mixed, in random order" in text and "memory: " in text


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (["none.engine"], "none.engine does not exist", 2),
        (["{engine}", "--profile"], "--profile is called --layers now", 2),
        (["{engine}", "--sizes", "0x5"], "at least 1", 2),
        (["{engine}", "--sizes", "nowhere"], "nowhere does not exist", 2),
        (["{engine}", "--sizes", "1x1:2x2:3x3"], "is a range of profiles", 2),
        (["{engine}", "--seconds", "0"], "seconds", 2),
        (["{engine}", "--threads", "0"], "threads", 2),
        (["{junk}"], "not an engine", 1),
    ],
)
def test_what_is_wrong_is_one_line(exports, tmp_path, words, said, code):
    (tmp_path / "junk.engine").write_bytes(b"junk")
    places = {"engine": exports / "narrow.engine", "junk": tmp_path / "junk.engine"}
    done = command("bench-engine", *(word.format(**places) for word in words), ok=code)
    assert said in one_error(done) and not done.stdout


def test_an_image_that_does_not_fit_the_card_is_one_line(exports, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((30, 20, 5), np.uint8))
    with pytest.raises(DeployError, match=r"a\.npy") as caught:
        bench(exports / "narrow.engine", parse_sizes(str(tmp_path)), seconds=0.1)
    assert "\n" not in str(caught.value)
    with pytest.raises(MisuseError, match="range of profiles"):
        bench_engine(exports / "narrow.engine", "1x1:2x2:3x3")
