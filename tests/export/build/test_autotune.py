"""The choice among candidates: by what was measured, never by labels that do not hold."""

import json
import math
import os
import re
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
from fcn_deploy.calibration.report.engine_report import report_of
from fcn_deploy.export.build import autotune
from fcn_deploy.export.build.autotune import (
    ALONE_ROUNDS,
    LEAST_ROUNDS,
    ROUNDS,
    TILES,
    Candidate,
    Timing,
    choose,
    fastest_tile,
    fewer_threads,
    measure,
    tune,
)
from fcn_deploy.export.build.config import BuildConfig, TuningOptions, backends_of
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.build.report_parts import candidate_reports, show_candidates
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.quantization.options import QuantizationOptions
from fcn_deploy.runtime.backends import openvino
from fcn_deploy.runtime.backends.onnxruntime import physical_cores
from fcn_deploy.runtime.engine_format.engine_file import EngineFile
from fcn_deploy.runtime.engine_format.stage import Stage
from fcn_deploy.runtime.errors import OverBudgetError
from helpers import command, needs, one_error, photo, save_photos

from fcn_deploy import DeployError, MisuseError, ModelCard, Segmenter

ORT, OV = Candidate("onnxruntime", "float32"), Candidate("openvino", "float32")
ORT8, OV8 = Candidate("onnxruntime", "int8"), Candidate("openvino", "int8")
IMAGES = {"32x32": np.zeros((32, 32, 3), np.uint8), "64x64": np.zeros((64, 64, 3), np.uint8)}


class Clock:
    """Time that passes only as calls say."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def taking(self, *seconds, log=None, name=None):
        """A call that takes these seconds, one after the other, again and again."""
        turns = count()

        def call(image):
            self.now += seconds[next(turns) % len(seconds)] * (image.shape[0] / 32) ** 2
            if log is not None:
                log.append((name, image.shape[0]))

        return call


def test_the_fastest_is_chosen_and_its_time_is_the_median():
    clock = Clock()
    timings = measure({ORT: clock.taking(0.2), OV: clock.taking(0.1)}, IMAGES, 100, clock)
    assert choose(timings) == OV
    assert timings[OV].milliseconds == {"32x32": 100.0, "64x64": 400.0}
    assert timings[OV].relative_time == pytest.approx(0.5) and timings[ORT].relative_time == 1
    reports = candidate_reports(timings, OV)
    assert [row.against_chosen for row in reports] == [2.0, 1.0]
    assert [row.chosen for row in reports] == [False, True]
    table = show_candidates(reports)
    assert "× 2.00" in table and "chosen" in table.splitlines()[2]


def test_a_lead_within_the_noise_changes_nothing():
    clock = Clock()
    timings = measure({ORT: clock.taking(0.100), OV: clock.taking(0.099)}, IMAGES, 100, clock)
    assert choose(timings) == ORT


def test_disturbed_rounds_do_not_decide():
    """Two of three runs of the faster one are disturbed, by ten times."""
    clock = Clock()
    timings = measure({ORT: clock.taking(0.2), OV: clock.taking(1.0, 0.1, 1.0)}, IMAGES, 1000, clock)
    assert choose(timings) == OV


def test_candidates_run_in_turn_and_the_size_changes_only_between_rounds():
    clock, log = Clock(), []
    measure({c: clock.taking(0.1, log=log, name=c) for c in (ORT, OV)}, IMAGES, 100, clock)
    assert [size for _, size in log] == sorted(size for _, size in log)
    timed = [name for name, size in log if size == 32][3:]  # after the first runs
    assert len(timed) == 2 * ROUNDS
    for turn in range(0, len(timed), 2):
        assert set(timed[turn : turn + 2]) == {ORT, OV}
    assert len({tuple(timed[turn : turn + 2]) for turn in range(0, len(timed), 2)}) == 2, "always the same order"


def test_what_is_left_behind_is_measured_no_further_and_never_chosen():
    clock = Clock()
    calls = {ORT: clock.taking(0.1), OV: clock.taking(0.09), ORT8: clock.taking(0.5)}
    timings = measure(calls, IMAGES, 1000, clock)
    assert timings[ORT8].rounds == [LEAST_ROUNDS] * 2 and timings[OV].rounds == [ROUNDS] * 2
    assert timings[ORT8].relative_time == pytest.approx(5)


def test_measuring_takes_its_time_and_no_more():
    clock = Clock()
    timings = measure({ORT: clock.taking(0.01), OV: clock.taking(0.01)}, IMAGES, 20, clock)
    assert clock.now <= 2 and timings[OV].rounds == [ROUNDS] * 2
    clock = Clock()
    timings = measure({ORT: clock.taking(1), OV: clock.taking(1)}, IMAGES, 60, clock)
    assert clock.now <= 70 and LEAST_ROUNDS <= timings[OV].rounds[1] < ROUNDS
    clock = Clock()
    timings = measure({ORT: clock.taking(30), OV: clock.taking(10)}, IMAGES, 20, clock)
    assert timings[OV].rounds == [1, 1] and choose(timings) == OV, "slow ones still get a round"
    clock = Clock()
    assert measure({ORT: clock.taking(0.1)}, IMAGES, 100, clock)[ORT].rounds == [ALONE_ROUNDS] * 2


def test_a_size_that_the_memory_cannot_hold_is_left_out():
    def too_large(image):
        if image.shape[0] == 64:
            raise OverBudgetError("no")

    clock = Clock()
    timings = measure({ORT: clock.taking(0.2), OV: clock.taking(0.1)}, {"32x32": IMAGES["32x32"]}, 10, clock)
    assert choose(timings) == OV
    timings = measure({ORT: too_large, OV: too_large}, {"64x64": IMAGES["64x64"]}, 10)
    assert timings[OV].milliseconds == {"64x64": None} and math.isnan(timings[OV].relative_time)
    assert choose(timings) == ORT and candidate_reports(timings, ORT)[0].against_chosen is None
    assert "-" in show_candidates(candidate_reports(timings, ORT))


def opener(seconds, clock, opened=None):
    @contextmanager
    def open_(candidate):
        if opened is not None:
            opened.append(candidate)
        if isinstance(seconds[candidate], Exception):
            raise seconds[candidate]
        yield SimpleNamespace(result=clock.taking(seconds[candidate]))

    return open_


@pytest.fixture
def fake_time(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(
        autotune, "measure", lambda calls, images, seconds, step: measure(calls, images, seconds, clock, step)
    )
    return clock


def test_labels_that_do_not_hold_are_never_chosen(fake_time, caplog):
    open_ = opener({ORT: 0.5, OV: 0.1}, fake_time)
    timings, chosen = tune(open_, lambda c, net: "wrong" if c == OV else "", [ORT, OV], IMAGES, TuningOptions())
    assert chosen == ORT and timings[OV].refused == "wrong" and not timings[OV].milliseconds
    assert (
        "refused: wrong" in show_candidates(candidate_reports(timings, chosen))
        and "openvino, float32: not used: wrong" in caplog.text
    )


def test_what_cannot_be_opened_or_checked_is_refused(fake_time):
    def check(candidate, net):
        if candidate == OV8:
            raise DeployError("labels differ")
        return ""

    open_ = opener({ORT: 0.5, OV: DeployError("cannot load"), OV8: 0.1}, fake_time)
    timings, chosen = tune(open_, check, [OV8, OV, ORT], IMAGES, TuningOptions())
    assert chosen == ORT and (timings[OV].refused, timings[OV8].refused) == ("cannot load", "labels differ")
    with pytest.raises(
        DeployError, match=r"\(openvino, float32: cannot load; openvino, int8: labels differ\); name another --backend"
    ):
        tune(open_, check, [OV, OV8], IMAGES, TuningOptions())


def test_the_precision_is_the_users_unless_the_fastest_is_asked_for(fake_time):
    open_ = opener({ORT8: 0.3, OV8: 0.2, ORT: 0.1}, fake_time)
    ask = [ORT8, OV8, ORT]
    assert tune(open_, lambda *_: "", ask, IMAGES, TuningOptions(), among=lambda c: c.precision == "int8")[1] == OV8
    assert tune(open_, lambda *_: "", ask, IMAGES, TuningOptions())[1] == ORT


def test_fewer_threads_are_for_the_report(fake_time, monkeypatch):
    """An engine runs with one per core where it goes, so that is what decides, even where half are faster here."""
    monkeypatch.setattr(autotune, "fewer_threads", lambda: [4, 2, 1])
    seconds = {ORT: 0.2, OV: 0.1, Candidate("openvino", "float32", 4): 0.08}
    seconds |= {Candidate("openvino", "float32", 2): 0.12, Candidate("openvino", "float32", 1): 0.2}
    opened = []
    open_ = opener(seconds, fake_time, opened)
    timings, chosen = tune(open_, lambda *_: "", [ORT, OV], IMAGES, TuningOptions(fewer_threads=True))
    assert chosen == OV
    against = {r.threads: r.against_chosen for r in candidate_reports(timings, chosen) if r.backend == "openvino"}
    assert against == pytest.approx({"one per core": 1, 4: 0.8, 2: 1.2})
    assert Candidate("openvino", "float32", 1) not in opened, "tried though fewer were slower already"
    assert not any(candidate.backend == "onnxruntime" and candidate.threads for candidate in opened)
    asked = Candidate("onnxruntime", "float32", 1)
    timings, _ = tune(opener({asked: 1}, fake_time), lambda *_: "", [asked], IMAGES, TuningOptions(fewer_threads=True))
    assert list(timings) == [asked]


def test_a_core_counts_once_however_many_threads_it_runs(tmp_path):
    for index, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        topology = tmp_path / f"cpu{index}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{siblings}\n")
    (tmp_path / "cpufreq").mkdir()
    assert physical_cores(tmp_path) == 2
    assert physical_cores(tmp_path / "none") == os.cpu_count()


def test_halves_of_the_physical_cores(monkeypatch):
    monkeypatch.setattr(autotune, "physical_cores", lambda: 4)  # of 8 logical processors, say
    assert fewer_threads() == [2, 1]
    assert fewer_threads(1) == [] and fewer_threads(2) == [1]
    assert fewer_threads(12) == [6, 3, 1] and fewer_threads(16) == [8, 4, 2, 1]


# For real


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    save_photos(folder, [(50 + 9 * index, 120 - 7 * index) for index in range(6)])
    return folder


@pytest.mark.slow
def test_build_engine_measures_what_is_installed(exports, tmp_path):
    needs("openvino")
    words = ["build-engine", exports / "narrow.onnx", "-o", tmp_path / "m.engine", "--sizes", "33x65,64x32"]
    record = json.loads(command(*words, "--json").stdout)
    with EngineFile(tmp_path / "m.engine") as file:
        manifest, report = file.manifest, report_of(file)
    every = [(row.backend, row.threads) for row in report.candidates]
    assert every[:2] == [("onnxruntime", "one per core"), ("openvino", "one per core")]
    assert all(set(row.latency_ms) == {"33x65", "64x32"} for row in report.candidates)
    (chosen,) = (row for row in report.candidates if row.chosen)
    assert report.backend == manifest.backend == chosen.backend and report.latency_ms == chosen.latency_ms
    assert [row["chosen"] for row in record["candidates"]] == [row.chosen for row in report.candidates]
    with Segmenter(tmp_path / "m.engine") as net:
        assert net.backend == chosen.backend
    for name in ("onnxruntime", "openvino"):
        done = command(*words, "--force", "--backend", name, "--threads", "1", "--json")
        (row,) = json.loads(done.stdout)["candidates"]
        assert (row["backend"], row["threads"], row["chosen"]) == (name, 1, True)
    text = command(*words, "--force").stdout
    assert "measured side by side" in text and "chosen" in text and "openvino" in text


@pytest.mark.slow
def test_fastest_keeps_float32_where_int8_is_slower(exports, tmp_path, photos, monkeypatch):
    """INT8 is made slow through the clock's seam; everything else is real."""

    def slow_int8(calls, images, seconds, step):
        return {c: Timing(dict.fromkeys(images, 1.0), 3.0 if c.precision == "int8" else 1.0, [1], "") for c in calls}

    monkeypatch.setattr(autotune, "measure", slow_int8)
    source, out = import_model(exports / "narrow.onnx"), tmp_path / "m.engine"
    options = QuantizationOptions(int8=True, calib=str(photos), max_drop=100)
    report = build_engine(
        source, out, BuildConfig(quantization=replace(options, fastest=True), latency_sizes=[(32, 32)])
    )
    assert report.precision == "float32" and report.speedup == pytest.approx(1 / 3, abs=0.01)
    with Segmenter(out) as net, Segmenter(exports / "narrow.engine") as plain:
        assert net.precision == net.network.manifest.precision == "float32"
        np.testing.assert_array_equal(net(photo(61, 97)), plain(photo(61, 97)))
    # Asked for by name, INT8 is kept.
    report = build_engine(source, out, BuildConfig(quantization=options, latency_sizes=[(32, 32)]))
    assert report.precision == "int8" and report.speedup < 1


@pytest.mark.slow
def test_fastest_keeps_float32_where_int8_loses_too_much(exports, tmp_path, photos):
    options = QuantizationOptions(int8=True, calib=str(photos), max_drop=0.0)
    source, out = import_model(exports / "narrow.onnx"), tmp_path / "m.engine"
    with pytest.raises(DeployError, match="INT8 within --max-drop"):
        build_engine(source, out, BuildConfig(quantization=options, latency_sizes=[(32, 32)]))
    report = build_engine(
        source, out, BuildConfig(quantization=replace(options, fastest=True), latency_sizes=[(32, 32)])
    )
    assert report.precision == "float32" and report.notes[-1].startswith("float32 is kept: no layer")
    with Segmenter(out) as net:
        assert net.precision == "float32"


@pytest.mark.slow
def test_int8_that_loses_too_much_by_a_librarys_own_kernels_is_not_run_by_it(exports, tmp_path, photos, monkeypatch):
    needs("openvino")

    class Broken(openvino.OpenVinoSession):
        def run(self, image):
            return super().run(image)[::, ::-1].copy()

    monkeypatch.setattr(openvino, "OpenVinoSession", Broken)
    options = QuantizationOptions(int8=True, calib=str(photos), max_drop=60)
    tuning = TuningOptions(("onnxruntime", "openvino"), seconds=1)
    out = tmp_path / "m.engine"
    report = build_engine(
        import_model(exports / "narrow.onnx"),
        out,
        BuildConfig(quantization=options, tuning=tuning, latency_sizes=[(32, 32)]),
    )
    row = next(row for row in report.candidates if (row.backend, row.precision) == ("openvino", "int8"))
    assert re.search("by its kernels: .*60 allowed", row.refused) and report.backend == "onnxruntime"
    with EngineFile(out) as file:
        assert file.manifest.backend == "onnxruntime"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fastest"], "pass --calib FOLDER"),
        (
            ["--fastest", "--calib", "x", "--target", "ort-cuda"],
            "--fastest is for --target cpu and for TensorRT's plans",
        ),
        (["--fastest", "--int8", "--calib", "x", "--target", "sm89"], "tries every precision of the GPU; omit --int8"),
        (["--backend", "openvino", "--target", "ort-cuda"], "--backend is for --target cpu"),
        (["--backend", "abacus"], "abacus"),
        (["--standalone", "--backend", "auto"], "omit --backend"),
    ],
)
def test_misuse_is_one_line(exports, tmp_path, words, said):
    out = tmp_path / ("m.onnx" if "--standalone" in words else "m.engine")
    assert said in one_error(command("build-engine", exports / "narrow.onnx", "-o", out, *words, ok=2))
    assert not out.exists()


def test_a_backend_that_does_not_exist():
    with pytest.raises(MisuseError, match="choose auto, onnxruntime or openvino"):
        backends_of("abacus")


def test_sizes_that_change_are_measured_at_sizes_that_change():
    seen = []

    def prepares_for_a_shape(image):
        seen.append(image.shape[:2])

    image = np.zeros((256, 192, 3), np.uint8)
    measure({ORT: prepares_for_a_shape}, {"256x192": image}, 1000, step=32)
    timed = seen[2:]  # after first runs
    assert len(set(timed)) == len(timed) == ALONE_ROUNDS and (256, 192) not in timed
    assert all(256 - side[0] <= 64 and 192 - side[1] <= 96 for side in timed)
    seen.clear()
    measure({ORT: prepares_for_a_shape}, {"20x7": image[:20, :7]}, 1000, step=32)
    assert set(seen) == {(20, 7)}


class Tiled:
    """An engine whose runs take `whole` a pixel, or what `tiles` says of their sides."""

    def __init__(self, whole, tiles, halo=(32, 32), memory=10**12):
        self.card = ModelCard(("a", "b"), size_multiple=32)
        stages = Stage("a", halo=halo, period=32, bytes_per_pixel=100), Stage("b", bytes_per_pixel=9, cost=1.0)
        self.stages = stages
        self.whole, self.tiles, self.memory, self.clock, self.runs = whole, tiles, memory, Clock(), 0

    def memory_budget(self):
        return self.memory

    def scores_by(self, image, plan):
        self.runs += 1
        area = plan.padded[0] * plan.padded[1]
        self.clock.now += area * (self.tiles[plan.grids[0].tile[0]] if plan.grids else self.whole) / 1e6

    def choice(self, size=(1536, 1536), seconds=1e3):
        return fastest_tile(self, np.zeros((*size, 3), np.uint8), seconds, self.clock)


def test_the_tiles_that_run_fastest_are_kept():
    assert Tiled(1.0, {384: 0.9, 512: 0.7, 768: 0.8, 1024: 0.99}).choice((3072, 3072)) == 512
    assert Tiled(1.0, {384: 0.99, 512: 0.97, 768: 0.98, 1024: 1}).choice((3072, 3072)) is None


def test_tiles_that_cannot_be_tried_are_not_kept():
    fast = dict.fromkeys(TILES, 0.1)
    assert Tiled(1.0, fast).choice((3072, 3072)) is not None
    assert Tiled(1.0, fast, halo=None).choice((3072, 3072)) is None
    assert Tiled(1.0, fast, memory=10**6).choice((3072, 3072)) is None
    assert Tiled(1.0, fast).choice((256, 320)) is None
    slow = Tiled(1.0, fast)
    assert slow.choice((3072, 3072), seconds=1) is None and slow.runs == 1
    # Halos of half a tile compute everything twice.
    assert Tiled(1.0, {768: 0.1, 1024: 0.1}, halo=(480, 480)).choice((3072, 3072)) is None
