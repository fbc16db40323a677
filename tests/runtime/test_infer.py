"""python -m runtime.infer and verify-engine, as a user runs them."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial

import numpy as np
import pytest
import tifffile
from helpers import command, label_records, one_error, photo, save_photos
from PIL import Image

from fcn_deploy import Segmenter


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    save_photos(folder, [(28, 28), (61, 97), (120, 80), (1, 1)], "p{}.png")
    return folder


def test_a_folder_is_labelled(exports, photos, tmp_path):
    out = tmp_path / "out"
    done = command("infer", exports / "narrow.engine", photos, "-o", out, "--overlay", "--json")
    records = label_records(done)
    assert [record["size"] for record in records] == [[28, 28], [61, 97], [120, 80], [1, 1]]
    assert records[1]["plan"]["padded"] == [64, 128] and records[1]["plan"]["bytes"] > 64 * 128
    with Segmenter(exports / "narrow.engine") as net:
        for record in records:
            assert set(record["ms"]) == {"read", "label", "write"} and min(record["ms"].values()) > 0
            expected = net(np.asarray(Image.open(record["file"])))
            np.testing.assert_array_equal(np.asarray(Image.open(record["labels"])), expected)
            assert Image.open(record["overlay"]).mode == "RGB"
    assert len(list(out.iterdir())) == 8


def test_globs_files_and_explain(exports, photos, tmp_path):
    done = command("infer", exports / "narrow.engine", f"{photos}/p[01].png", photos / "p2.png", "-o", tmp_path / "o",
                   "--explain")  # fmt: skip
    assert "plan: padded to 64×128 (multiples of 32), one run, about" in done.stdout
    assert "3 of 3 images labelled" in done.stdout


def test_globs_that_descend_keep_their_folders(exports, tmp_path):
    for folder in ("", "x/", "x/y/", "z/"):
        save_photos(tmp_path / "in" / folder, [(28, 28)], "1.png")
    words = "infer", exports / "narrow.engine", f"{tmp_path}/in/**", "-o", tmp_path / "o"
    command(*words, "--overlay", "--shard", "1/2")
    some = len(list((tmp_path / "o").rglob("1.png")))
    again = command(*words, "--resume")
    assert 0 < some < 4 and f"{4 - some} of 4 images labelled, {some} were there already" in again.stdout
    expected = {"1.png", "x/1.png", "x/y/1.png", "z/1.png"}
    assert {str(file.relative_to(tmp_path / "o")) for file in (tmp_path / "o").rglob("1.png")} == expected
    folders = tmp_path / "in", tmp_path / "in" / "x"
    error = one_error(command("infer", exports / "narrow.engine", *folders, "-o", tmp_path / "p", ok=2))
    assert "1.png is the name of several images" in error and "'FOLDER/**'" in error
    assert not (tmp_path / "p").exists()
    save_photos(tmp_path / "in" / "z", [(28, 28)], "1.bmp")
    error = one_error(command(*words, "--resume", "--shard", "1/2", ok=2))
    assert "/1.bmp and " in error and "/1.png differ in suffix only" in error


def test_a_broken_image_does_not_stop_the_rest(exports, photos, tmp_path):
    (photos / "p1.png").write_bytes((photos / "p1.png").read_bytes()[:200])
    (photos / "a.jpg").write_text("no image")
    done = command("infer", exports / "narrow.engine", photos, "-o", tmp_path / "o", ok=1)
    assert "3 of 5 images labelled" in done.stdout
    errors = done.stderr.splitlines()
    assert len(errors) == 2 and "a.jpg" in errors[0] and "p1.png" in errors[1]
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["p0.png", "p2.png", "p3.png"]
    done = command("infer", exports / "narrow.engine", photos, "-o", tmp_path / "o2", "--json", ok=1)
    assert [record["file"][-5:] for record in label_records(done) if "error" in record] == ["a.jpg", "1.png"]


def test_outputs_are_never_overwritten_without_force(exports, photos, tmp_path):
    out = tmp_path / "o"
    out.mkdir()
    (out / "p2.png").write_text("precious")
    done = command("infer", exports / "narrow.engine", photos, "-o", out, ok=2)
    assert "p2.png exists already" in one_error(done)
    assert [path.name for path in out.iterdir()] == ["p2.png"] and (out / "p2.png").read_text() == "precious"
    command("infer", exports / "narrow.engine", photos, "-o", out, "--force")
    assert Image.open(out / "p2.png").size == (80, 120)


def test_inputs_are_never_overwritten_even_with_force(exports, photos):
    before = (photos / "p0.png").read_bytes()
    done = command("infer", exports / "narrow.engine", photos, "-o", photos, "--force", ok=2)
    assert "is an input" in one_error(done) and (photos / "p0.png").read_bytes() == before


def test_equal_stems_keep_their_suffix(exports, photos, tmp_path):
    Image.open(photos / "p0.png").save(photos / "p0.bmp")
    command("infer", exports / "narrow.engine", photos, "-o", tmp_path / "o")
    assert {"p0.png.png", "p0.bmp.png", "p1.png"} <= {path.name for path in (tmp_path / "o").iterdir()}
    shutil.copytree(photos, tmp_path / "more")
    done = command("infer", exports / "narrow.engine", photos, tmp_path / "more", "-o", tmp_path / "o2", ok=2)
    assert "overwrite each other" in one_error(done)


def test_misuse_is_one_line_and_exit_2(exports, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    engine = exports / "narrow.engine"
    for words, said in (
        ((engine, tmp_path / "empty", "-o", tmp_path / "o"), "holds no images"),
        ((engine, tmp_path / "none.jpg", "-o", tmp_path / "o"), "does not exist"),
        ((engine, photos, "-o", tmp_path / "o", "--threads", "0"), "threads"),
        ((engine, photos, "-o", tmp_path / "o", "--max-pixels", "many"), "max-pixels"),
        ((engine, photos), "--out"),
        ((engine, photos, "-o", tmp_path / "o", "--frobnicate"), "--frobnicate"),
    ):
        assert said in one_error(command("infer", *words, ok=2))
    assert not (tmp_path / "o").exists()


def test_failures_are_one_line_and_exit_1(exports, photos, tmp_path):
    (tmp_path / "bad.engine").write_bytes((exports / "narrow.engine").read_bytes()[:5000])
    assert "truncated" in one_error(command("infer", tmp_path / "bad.engine", photos, "-o", tmp_path / "o", ok=1))
    (tmp_path / "file").write_text("")
    done = command("infer", exports / "narrow.engine", photos, "-o", tmp_path / "file" / "o", ok=1)
    assert "cannot write" in one_error(done)
    done = command("infer", exports / "narrow.engine", photos, "-o", tmp_path / "o", "--max-pixels", "500", ok=1)
    assert "over the limit of 500" in done.stderr and "1 of 4 images labelled" in done.stdout


def test_records_keep_the_order_of_many_small_and_large_images(exports, tmp_path):
    folder, engine = tmp_path / "in", exports / "narrow.engine"
    folder.mkdir()
    sizes = [((7 * i) % 50 + 1, 40) if i % 9 else (300, 400 + i) for i in range(60)]
    save_photos(folder, sizes, "{:02}.png")
    done = command("infer", engine, folder, "-o", tmp_path / "o", "--json")
    records = label_records(done)
    assert [tuple(record["size"]) for record in records] == sizes
    with Segmenter(engine) as net:
        for record in records:
            expected = net(np.asarray(Image.open(record["file"])))
            np.testing.assert_array_equal(np.asarray(Image.open(record["labels"])), expected)


def test_resume_does_what_is_left(exports, photos, tmp_path):
    engine, out = exports / "narrow.engine", tmp_path / "o"
    command("infer", engine, photos / "p1.png", "-o", out)
    before = (out / "p1.png").stat().st_mtime_ns
    done = command("infer", engine, photos, "-o", out, "--resume", "--json")
    records = label_records(done)
    assert [record.get("skipped", False) for record in records] == [False, True, False, False]
    assert records[1]["labels"] == str(out / "p1.png") and (out / "p1.png").stat().st_mtime_ns == before
    assert len(list(out.iterdir())) == 4
    done = command("infer", engine, photos, "-o", out, "--resume")
    assert "0 of 4 images labelled, 4 were there already" in done.stdout
    # Where a picture is wanted too, an image without one is not done.
    (out / "p0.overlay.png").write_bytes(b"")
    done = command("infer", engine, photos, "-o", out, "--resume", "--overlay")
    assert "3 of 4 images labelled, 1 were there" in done.stdout
    assert "choose one" in one_error(command("infer", engine, photos, "-o", out, "--resume", "--force", ok=2))


def test_a_disk_that_fills_ends_the_run_with_one_line(exports, photos, tmp_path):
    Image.fromarray(photo(400, 500)).save(photos / "p2.png")
    program = [sys.executable, "-m", "runtime.infer", exports / "narrow.engine", photos, "-o", tmp_path / "o"]
    done = subprocess.run(
        program, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500)),
    )  # fmt: skip
    assert done.returncode == 1
    assert "p2.png: File too large; free space there" in one_error(done)
    written = {path.name for path in (tmp_path / "o").iterdir()}
    assert {"p0.png", "p1.png"} <= written <= {"p0.png", "p1.png", "p3.png"}
    for name in written:
        Image.open(tmp_path / "o" / name).load()
    done = subprocess.run([*program, "--resume"], capture_output=True, text=True)
    assert done.returncode == 0 and len(list((tmp_path / "o").iterdir())) == 4


def begun(program):
    """A program that runs on, and heeds Ctrl-C even where the tests run in the background of a shell, which do not."""
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_the_run_can_go_on(exports, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "o"
    folder.mkdir()
    for index in range(200):
        (folder / f"{index:03}.png").symlink_to(tmp_path / "photo.png")
    Image.fromarray(photo(500, 700)).save(tmp_path / "photo.png")
    program = [sys.executable, "-m", "runtime.infer", exports / "narrow.engine", folder, "-o", out, "--overlay"]
    running = begun(program)
    for _ in range(3):
        assert "→" in running.stdout.readline()
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate()
    assert running.returncode == 130
    assert errors == "python -m runtime.infer: error: interrupted\n"
    written = sorted(path.name for path in out.iterdir())
    assert 6 <= len(written) < 400 and not [name for name in written if name.startswith(".")]
    for name in written:
        Image.open(out / name).load()
    for path in sorted(folder.iterdir())[20:]:
        path.unlink()
    started = time.time_ns()
    done = subprocess.run([*program, "--resume"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first = (out / "000.png").stat()
    assert first.st_mtime_ns < started and len(list(out.glob("0[01]*.png"))) == 40


@pytest.mark.slow
def test_a_large_file_is_labelled_by_regions_and_ctrl_c_tells_how_far_it_came(exports, tmp_path):
    image, out = photo(1700, 100), tmp_path / "o"
    georeference = [(33550, "d", 3, (0.5, 0.5, 0.0), True), (34735, "H", 4, (1, 1, 0, 0), True)]
    tifffile.imwrite(tmp_path / "map.tif", image, tile=(64, 64), compression="zlib", extratags=georeference)
    words = [exports / "narrow.engine", tmp_path / "map.tif", "-o", out, "--memory", "0.004", "--overlay"]
    running = begun([sys.executable, "-m", "runtime.infer", *words])
    state = out / ".map.tif.partial.json"
    while not state.exists() and running.poll() is None:
        time.sleep(0.005)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate()
    assert running.returncode == 130
    assert re.fullmatch(
        r"python -m runtime.infer: error: interrupted at row \d+ of 1700 of .*map.tif; "
        r"the same command with --resume goes on from there\n", errors
    )  # fmt: skip
    assert {path.name for path in out.iterdir()} == {".map.tif.partial", ".map.tif.partial.json"}
    done = command("infer", *words, "--resume", "--explain", "--json")
    (record,) = label_records(done)
    assert record["size"] == [1700, 100] and [stage["tiles"] > 1 for stage in record["plan"]["stages"]] == [True, True]
    assert {path.name for path in out.iterdir()} == {"map.tif", "map.overlay.png"}
    with Segmenter(exports / "narrow.engine") as net:
        np.testing.assert_array_equal(tifffile.imread(out / "map.tif"), net(image))
    text = command("infer", *words, "--force", "--explain").stdout
    assert "times the work in tiles" in text and re.search(
        r"stage 1: \d+ tiles of \d+×\d+ with a halo of 480×480", text
    )


def test_verify_engine_compares_and_times(exports):
    report = json.loads(command("verify-engine", exports / "narrow.engine", "--json", measured=True).stdout)
    assert report["passed"] and report["labels_equal"] == 1 and report["difference"] < 1e-4
    assert report["latency"][0]["size"] == [256, 256] and len(report["latency"]) == 4
    assert "golden sample: ok" in command("verify-engine", exports / "narrow.engine").stdout


@pytest.mark.slow
def test_verify_engine_fails_where_scores_differ(exports, tmp_path):
    import io

    from fcn_deploy.runtime.engine_format.engine_file import EngineFile, write_engine

    with EngineFile(exports / "narrow.engine") as file:
        members = {name: file.read(name) for name in file.manifest.members}
        manifest = file.manifest
    golden = dict(np.load(io.BytesIO(members["golden.npz"])))
    for name, change in (("shift", 0.1), ("nan", np.nan)):
        buffer = io.BytesIO()
        np.savez(buffer, **(golden | {"scores": golden["scores"] + change}))
        write_engine(tmp_path / f"{name}.engine", manifest, members | {"golden.npz": buffer.getvalue()})
        done = command("verify-engine", tmp_path / f"{name}.engine", ok=1)
        assert "golden sample: FAILED" in done.stdout


def test_verify_engine_refuses_an_edited_engine(exports, tmp_path):
    with zipfile.ZipFile(exports / "narrow.engine") as archive:
        place = archive.getinfo("golden.npz").header_offset + 400
    content = bytearray((exports / "narrow.engine").read_bytes())
    content[place] ^= 1
    (tmp_path / "e.engine").write_bytes(content)
    assert "damaged" in one_error(command("verify-engine", tmp_path / "e.engine", ok=1))
