"""Videos in, label videos out: times kept, broken ones reported, nothing half-written."""

import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from helpers import command, one_error, photo
from PIL import Image
from videos import film, frames, label, motion_jpeg

from fcn_deploy import Segmenter


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "size"),
    [
        ("a.mp4", "libx264", "yuv420p", (48, 64)),
        ("a.mkv", "ffv1", "bgr0", (33, 47)),
        ("a.avi", "mjpeg", "yuvj420p", (120, 90)),
        ("a.mpg", "mpeg2video", "yuv420p", (48, 64)),
        ("a.ts", "mpeg2video", "yuv420p", (48, 64)),
    ],
)
@pytest.mark.parametrize("count", [1, 40])
def test_each_frame_has_its_labels_at_its_time(exports, tmp_path, name, codec, pixels, size, count):
    source = film(tmp_path / name, count, size, codec, pixels)
    engine = exports / "narrow.engine"
    _, (record,) = label(engine, source, tmp_path / "o", "--overlay")
    assert record["frames"] == count and record["size"] == [*size] and "error" not in record
    assert set(record["ms"]) == {"read", "label", "write"} and min(record["ms"].values()) > 0
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["a.mkv", "a.overlay.mp4"]
    times, pictures = frames(source, "rgb24")
    found, labels = frames(record["labels"])
    np.testing.assert_allclose(found, times, atol=0.0006)  # Matroska's millisecond
    with Segmenter(engine) as net:
        for each, picture in zip(labels, pictures, strict=True):
            np.testing.assert_array_equal(each, net(picture))
    found, overlays = frames(record["overlay"], "rgb24")
    np.testing.assert_allclose(found, times, atol=0.0006)
    assert overlays[0].shape == (size[0] + size[0] % 2, size[1] + size[1] % 2, 3) and overlays[0].std() > 5


def test_uneven_times_and_rotation_are_kept(exports, tmp_path):
    source = film(tmp_path / "r.mp4", 6, rotate=90, step=3)
    _, (record,) = label(exports / "narrow.engine", source, tmp_path / "o")
    assert record["size"] == [64, 48]
    times, pictures = frames(source, "rgb24")
    assert times[1] - times[0] == pytest.approx(0.1001, abs=1e-3)
    found, labels = frames(record["labels"])
    np.testing.assert_allclose(found, times, atol=0.0006)
    with Segmenter(exports / "narrow.engine") as net:
        np.testing.assert_array_equal(labels[2], net(np.ascontiguousarray(np.rot90(pictures[2]))))


@pytest.fixture
def pictures(tmp_path):
    found = []
    for index in range(10):
        Image.fromarray(photo(48, 64, index)).save(tmp_path / f"{index}.jpeg", quality=90)
        found.append(tmp_path / f"{index}.jpeg")
    return found


def test_a_broken_frame_is_reported_and_the_rest_goes_on(exports, tmp_path, pictures):
    pictures[4] = b"\xff\xd8 no picture at all" + bytes(60)
    source = motion_jpeg(tmp_path / "v.avi", pictures)
    done, (record,) = label(exports / "narrow.engine", source, tmp_path / "o", ok=1)
    assert record["frames"] == 9 and "a frame at 0.40 s" in record["error"] and "other 9 frames" in record["error"]
    times, _ = frames(record["labels"])
    np.testing.assert_allclose(times, [0, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9], atol=0.0006)
    done = command("infer", exports / "narrow.engine", source, "-o", tmp_path / "p", ok=1)
    assert one_error(done).startswith("error: ") and "9 frames" in done.stdout


@pytest.mark.parametrize("name", ["t.avi", "t.mkv"])
def test_a_truncated_video_gives_what_there_is(exports, tmp_path, pictures, name):
    whole = motion_jpeg(tmp_path / name, pictures)
    content = whole.read_bytes()
    whole.write_bytes(content[: len(content) * 2 // 3])
    _, (record,) = label(exports / "narrow.engine", whole, tmp_path / "o", ok=1)
    assert 4 <= record["frames"] <= 7
    # An AVI's reader guesses the length by what is there, and finds half a frame at its end.
    assert ("it ends at 0." if name == "t.mkv" else "cannot be read") in record["error"]
    assert len(frames(record["labels"])[0]) == record["frames"]


def test_what_is_no_video_is_one_line_and_the_rest_goes_on(exports, tmp_path, pictures):
    folder = tmp_path / "in"
    folder.mkdir()
    film(folder / "good.mp4", 3)
    whole = film(tmp_path / "whole.mp4", 20).read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mkv").write_bytes(b"")
    (folder / "text.avi").write_text("no video")
    # A playlist would make the reader open other files, or addresses.
    (folder / "list.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{folder / 'good.mp4'}\n")
    (folder / "concat.mp4").write_text(f"ffconcat version 1.0\nfile {folder / 'good.mp4'}\n")
    Image.fromarray(photo(40, 40)).save(folder / "z.png")
    _, records = label(exports / "narrow.engine", folder, tmp_path / "o", ok=1)
    assert [("error" in record) for record in records] == [True, True, True, False, True, True, False]
    assert all("as a video" in record["error"] for record in records if "error" in record)
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["good.mkv", "z.png"]


def test_limits_and_outputs_that_exist(exports, tmp_path):
    engine, source = exports / "narrow.engine", film(tmp_path / "v.mp4", 3)
    _, (record,) = label(engine, source, tmp_path / "new" / "o", "--max-pixels", "3000", ok=1)
    assert not (tmp_path / "new").exists()  # a folder appears with what is in it
    assert "64×48 = 3,072 pixels, over the limit of 3,000" in record["error"]
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "v.mkv").write_text("precious")
    assert "v.mkv exists already" in one_error(command("infer", engine, source, "-o", tmp_path / "o", ok=2))
    _, (record,) = label(engine, source, tmp_path / "o", "--resume")
    assert record["skipped"] and (tmp_path / "o" / "v.mkv").read_text() == "precious"
    _, (record,) = label(engine, source, tmp_path / "o", "--force")
    assert record["frames"] == 3
    film(tmp_path / "v.mkv", 3)
    done = command("infer", engine, tmp_path / "v.mkv", "-o", tmp_path, "--force", ok=2)
    assert "is an input" in one_error(done)


@pytest.mark.parametrize("overlay", [(), ("--overlay",)])
def test_a_disk_that_fills_ends_the_run_with_one_line(exports, tmp_path, overlay):
    engine, source = exports / "narrow.engine", film(tmp_path / "v.mp4", 60, (96, 128))

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    done = subprocess.run(
        [sys.executable, "-m", "runtime.infer", engine, source, "-o", tmp_path / "o", *overlay],
        capture_output=True, text=True, preexec_fn=limit,
    )  # fmt: skip
    assert done.returncode == 1 and "cannot write" in one_error(done) and "File too large" in done.stderr
    assert not (tmp_path / "o").exists()


def test_a_missing_pyav_names_what_to_install(exports, tmp_path):
    source = film(tmp_path / "v.mp4", 2)
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "av.py").write_text("raise ModuleNotFoundError('no av')\n")
    path = os.pathsep.join(filter(None, (str(tmp_path / "stub"), os.environ.get("PYTHONPATH"))))
    done = command("infer", exports / "narrow.engine", source, "-o", tmp_path / "o", ok=1, env={"PYTHONPATH": path})
    assert "av is not installed; run: pip install 'fcn-deploy[video]'" in one_error(done)
