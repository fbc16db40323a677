"""Videos that are no files, live ones, and runs that were ended and went on."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from fractions import Fraction
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from fcn_deploy.runtime.images.addresses import Address, Latest, is_address
from helpers import command, one_error, photo
from PIL import Image
from videos import av, film, frames, label, motion_jpeg

RUN = [sys.executable, "-m", "runtime.infer"]
ONCE = "--live", "--reconnect", "0"


@pytest.fixture
def serve():
    """Starts an HTTP server with a handler; its address."""
    servers = []

    def start(handler):
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def equal_videos(one, other):
    (times, pictures), (others, found) = frames(one), frames(other)
    assert times == others
    np.testing.assert_array_equal(np.stack(pictures), np.stack(found))


@pytest.mark.parametrize("name", ["a.ts", "a.mkv"])
def test_a_piped_video_has_the_labels_of_the_file(exports, tmp_path, name):
    source = film(tmp_path / name, 12)
    label(exports / "narrow.engine", source, tmp_path / "file")
    with source.open("rb") as file:
        pipe = subprocess.Popen(["cat"], stdin=file, stdout=subprocess.PIPE)
        words = [*RUN, exports / "narrow.engine", "-", "-o", tmp_path / "o", "--json"]
        done = subprocess.run(words, stdin=pipe.stdout, capture_output=True, text=True)
        pipe.stdout.close()
        pipe.wait()
    record, _ = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 0 and record["file"] == "standard input" and record["frames"] == 12
    assert "dropped" not in record and record["fps"] > 0
    equal_videos(tmp_path / "o" / "stdin.mkv", tmp_path / "file" / "a.mkv")


def test_a_file_as_standard_input_may_have_its_index_at_the_end(exports, tmp_path):
    with film(tmp_path / "a.mp4", 4).open("rb") as file:
        words = [*RUN, exports / "narrow.engine", "-", "-o", tmp_path / "o"]
        done = subprocess.run(words, stdin=file, capture_output=True, text=True)
    assert done.returncode == 0 and "4 frames, " in done.stdout and " a second" in done.stdout
    assert len(frames(tmp_path / "o" / "stdin.mkv")[0]) == 4


def test_standard_input_that_is_no_video_is_one_line(exports, tmp_path):
    words = [*RUN, exports / "narrow.engine", "-", "-o", tmp_path / "o"]
    done = subprocess.run(words, input="no video", capture_output=True, text=True)
    assert done.returncode == 1 and "cannot read standard input as a video" in one_error(done)
    done = subprocess.run([*words, "--resume"], input="", capture_output=True, text=True)
    assert done.returncode == 2 and "standard input cannot be read again" in one_error(done)


def test_an_address_has_the_labels_of_the_file(exports, tmp_path, serve):
    film(tmp_path / "a b.mp4", 6)
    label(exports / "narrow.engine", tmp_path / "a b.mp4", tmp_path / "file")
    address = serve(partial(Quiet, directory=tmp_path)).replace("127", "me:secret@127") + "/a%20b.mp4?x=1"
    done, (record,) = label(exports / "narrow.engine", address, tmp_path / "o")
    assert record["frames"] == 6 and "dropped" not in record and "secret" not in done.stdout + done.stderr
    equal_videos(tmp_path / "o" / "a_b.mkv", tmp_path / "file" / "a b.mkv")


def test_an_address_that_answers_half_gives_what_there_is_and_says_so(exports, tmp_path, serve):
    content = film(tmp_path / "a.ts", 60, (96, 128)).read_bytes()

    class Half(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])

        def log_message(self, *args):
            pass

    _, (record,) = label(exports / "narrow.engine", serve(Half) + "/cam", tmp_path / "o", ok=1)
    assert 10 < record["frames"] < 60 and "it ends at " in record["error"]
    assert len(frames(tmp_path / "o" / "cam.mkv")[0]) == record["frames"]


def test_nothing_at_an_address_is_one_line_without_the_password(exports, tmp_path, serve):
    words = (
        exports / "narrow.engine",
        serve(partial(Quiet, directory=tmp_path)) + "/none.mp4",
        "rtsp://a:pw@[::1]:9/x",
    )
    done, records = label(*words[:1], words[1], tmp_path / "o", words[2], ok=1)
    assert all("is it there, and a video?" in record["error"] for record in records) and len(records) == 2
    assert "pw" not in done.stdout + done.stderr and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("given", "name", "live"),
    [
        ("rtsp://u:p@10.0.0.7:554/Streaming/Channels/101", "101", True),
        ("rtsp://10.0.0.7", "10.0.0.7", True),
        ("http://host/clip.mp4?token=1", "clip", False),
        ("https://host/live/", "live", False),
        ("udp://@239.0.0.1:1234", "239.0.0.1", True),
        ("/dev/video0", "video0", True),
        ("-", "stdin", False),
    ],
)
def test_addresses_have_names_and_are_live_or_not(given, name, live):
    assert is_address(given)
    address = Address.of(given, None)
    assert (address.name, address.live) == (name, live) and ":p@" not in str(address)
    assert Address.of(given, not live).live is not live


@pytest.mark.parametrize(
    "given", ["clip.mp4", "a/b.png", "https://host/a.jpg", "s3://bucket/clip.mp4", "/dev/null.mp4", "c:x"]
)
def test_files_and_addresses_of_images_are_none_of_videos(given):
    assert not is_address(given)


def test_live_without_an_address_is_refused(exports, tmp_path):
    source = film(tmp_path / "v.mp4", 1)
    done = command("infer", exports / "narrow.engine", source, "-o", tmp_path / "o", "--live", ok=2)
    assert "--live is of addresses" in one_error(done)


def test_the_newest_frames_of_a_live_source_are_kept_and_no_more():
    given = threading.Semaphore(0)

    def source():
        for index in range(100):
            given.acquire()
            yield index

    latest = Latest(source(), lambda: None)
    frames = latest.frames()
    for _ in range(50):
        given.release()
    while latest.dropped < 48:
        time.sleep(0.001)
    assert [next(frames), next(frames), latest.dropped] == [48, 49, 48]
    given.release()
    assert next(frames) == 50
    latest.stop()
    given.release(9)
    assert list(frames) == [] and latest.ended()


def test_what_a_live_source_raises_is_raised_after_its_frames():
    def source():
        yield 1
        raise ValueError("gone")

    frames = Latest(source(), lambda: None).frames()
    assert next(frames) == 1
    with pytest.raises(ValueError, match="gone"):
        next(frames)


def camera(pipe, stop, size=(48, 64), rate=200):
    """Writes Motion JPEG in Matroska into a pipe, in its own time, until told to stop."""
    options = {"flush_packets": "1", "cluster_time_limit": "40"}
    with suppress(OSError, av.error.FFmpegError), pipe, av.open(pipe, "w", format="matroska", options=options) as out:
        stream = out.add_stream("mjpeg", rate=rate)
        stream.width, stream.height, stream.pix_fmt = size[1], size[0], "yuvj420p"
        scene, index = photo(*size), 0
        while not stop.wait(1 / rate):
            frame = av.VideoFrame.from_ndarray(np.roll(scene, index, axis=1), format="rgb24")
            frame.pts, frame.time_base = 10_000 * rate + index, Fraction(1, rate)
            out.mux(stream.encode(frame))
            index += 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_live_source_is_labelled_until_a_signal_and_its_labels_are_whole(exports, tmp_path, number):
    words = [*RUN, exports / "narrow.engine", "-", "--live", "-o", tmp_path / "o", "--json"]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=False)
    stop = threading.Event()
    source = threading.Thread(target=camera, args=(process.stdin, stop))
    source.start()
    parts = tmp_path / "o" / ".stdin.mkv.partial" / "000000.labels.nut"
    while not parts.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.stdout.read(), process.stderr.read()
    stop.set()
    source.join()
    assert process.wait() == 0, err
    record, _ = map(json.loads, out.splitlines())
    assert record["frames"] >= 50 and record["dropped"] >= 0 and "error" not in record
    times, found = frames(tmp_path / "o" / "stdin.mkv")
    assert len(found) == record["frames"] and times[0] < 9  # not the camera's clock
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["stdin.mkv"]


def test_frames_that_come_too_fast_are_dropped_and_counted(exports, tmp_path):
    words = [*RUN, exports / "narrow.engine", "-", "--live", "-o", tmp_path / "o", "--json"]
    source = film(tmp_path / "v.ts", 200, (240, 320), options={"preset": "ultrafast"})
    with source.open("rb") as file:
        done = subprocess.run(words, stdin=file, capture_output=True, text=True)
    record, _ = map(json.loads, done.stdout.splitlines())
    assert record["dropped"] > 0 and record["frames"] + record["dropped"] == 200
    assert "faster than they are labelled" in done.stderr and len(done.stderr.splitlines()) == 1
    times, _ = frames(tmp_path / "o" / "stdin.mkv")
    steps = np.rint(np.diff(times) * 30000 / 1001)
    assert steps.max() > 1 and steps.min() == 1  # each at its own time


def ended(words, folder, part, number):
    """Run until a part is there, then end it by a signal."""
    process = subprocess.Popen([*map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (folder / part).exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    out, err = process.communicate()
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_video_whose_run_was_ended_is_gone_on_with(exports, tmp_path, number):
    source = film(tmp_path / "v.mp4", 220, step=3, options={"preset": "ultrafast"})
    engine = exports / "narrow.engine"
    label(engine, source, tmp_path / "whole", "--overlay")
    words = [*RUN, engine, source, "-o", tmp_path / "o", "--overlay"]
    code, _, err = ended(words, tmp_path / "o" / ".v.mkv.partial", "000001.labels.nut", number)
    assert code == (-9 if number == signal.SIGKILL else 130), err
    if number == signal.SIGINT:
        assert "interrupted at frame" in err and "--resume goes on from there" in err and len(err.splitlines()) == 1
    assert [path.name for path in (tmp_path / "o").iterdir()] == [".v.mkv.partial"]
    _, (record,) = label(engine, source, tmp_path / "o", "--overlay", "--resume")
    assert record["resumed"] >= 50 and record["frames"] == 220
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["v.mkv", "v.overlay.mp4"]
    equal_videos(tmp_path / "o" / "v.mkv", tmp_path / "whole" / "v.mkv")
    # Encoded with loss, and anew from where the run was ended.
    (times, pictures), (others, found) = (frames(tmp_path / folder / "v.overlay.mp4") for folder in ("o", "whole"))
    assert times == others
    assert np.abs(np.stack(pictures).astype(int) - np.stack(found).astype(int)).mean() < 3
    _, (record,) = label(engine, source, tmp_path / "o", "--overlay", "--resume")
    assert record["skipped"]


def test_what_is_kept_of_another_file_or_half_written_is_not_taken(exports, tmp_path):
    engine = exports / "narrow.engine"
    source = film(tmp_path / "v.mp4", 120, options={"preset": "ultrafast"})
    words = [*RUN, engine, source, "-o", tmp_path / "o"]
    ended(words, tmp_path / "o" / ".v.mkv.partial", "000001.labels.nut", signal.SIGKILL)
    lines = tmp_path / "o" / ".v.mkv.partial" / "parts.jsonl"
    text = lines.read_text().splitlines()
    lines.write_text("\n".join(text[:2]) + "\n[48, 64, 1")  # as a machine that lost its power
    label(engine, source, tmp_path / "whole")
    _, (record,) = label(engine, source, tmp_path / "o", "--resume")
    assert record["resumed"] == 50 and record["frames"] == 120
    equal_videos(tmp_path / "o" / "v.mkv", tmp_path / "whole" / "v.mkv")

    ended([*words, "--force"], tmp_path / "o" / ".v.mkv.partial", "000000.labels.nut", signal.SIGKILL)
    os.utime(source, ns=(1, 1))  # another file of this name
    _, (record,) = label(engine, source, tmp_path / "o", "--force")
    assert "resumed" not in record and record["frames"] == 120


def paced(chunk, send, packets, rate, pause=None):
    """Send packets in their own time, `rate` a second; `pause`: (packet, seconds) of silence before it."""
    for index, packet in enumerate(packets):
        if pause is not None and index == pause[0]:
            time.sleep(pause[1])
        send(chunk(packet))
        time.sleep(1 / rate)


def camera_over_http(content_type, chunk, packets, rate, pause=None):
    """A handler that answers as network cameras do: no length, and pictures as time goes by."""

    class Camera(Quiet):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.end_headers()
            with suppress(OSError):
                paced(chunk, self.wfile.write, packets, rate, pause)

    return Camera


def labels_by_time(video):
    times, found = frames(video)
    return {round(time_ * 30000 / 1001): picture for time_, picture in zip(times, found, strict=True)}


def in_ts_parts(path):
    """A transport stream in parts that hold about a picture each."""
    content = path.read_bytes()
    return [content[start : start + 188 * 8] for start in range(0, len(content), 188 * 8)]


@pytest.mark.parametrize("pause", [None, (20, 3.0)], ids=["steady", "silent for a while"])
def test_a_live_transport_stream_over_http_is_labelled_as_its_file(exports, tmp_path, serve, pause):
    """Every frame that was not dropped, at its own time; what comes after a silence too."""
    source = film(tmp_path / "a.ts", 60, (96, 128), options={"preset": "ultrafast", "g": "12"})
    label(exports / "narrow.engine", source, tmp_path / "file")
    handler = camera_over_http("video/mp2t", bytes, in_ts_parts(source), 40, pause)
    done, (record,) = label(exports / "narrow.engine", serve(handler) + "/live", tmp_path / "o", *ONCE, ok=1)
    assert "it ends at " in record["error"]  # a connection that closes may be the end, or a cable that was pulled
    assert record["frames"] + record["dropped"] == 60 and record["frames"] > 20, done.stderr
    expected, found = labels_by_time(tmp_path / "file" / "a.mkv"), labels_by_time(tmp_path / "o" / "live.mkv")
    assert len(found) == record["frames"]
    for moment, picture in found.items():
        np.testing.assert_array_equal(picture, expected[moment])


def test_motion_jpeg_over_http_is_labelled_as_its_pictures(exports, tmp_path, serve):
    """multipart/x-mixed-replace, which most network cameras offer beside RTSP."""
    pictures = [tmp_path / f"{index}.jpg" for index in range(30)]
    for index, picture in enumerate(pictures):
        Image.fromarray(np.roll(photo(48, 64), index, axis=1)).save(picture, quality=95)

    def part(file):
        picture = file.read_bytes()
        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
        return head.encode() + picture + b"\r\n"

    handler = camera_over_http("multipart/x-mixed-replace; boundary=frame", part, pictures, 20)
    engine = exports / "narrow.engine"
    _, (record,) = label(engine, serve(handler) + "/mjpg/video", tmp_path / "o", *ONCE, ok=1)
    assert "it ends at " in record["error"]
    _, found = frames(tmp_path / "o" / "video.mkv")
    assert record["frames"] + record["dropped"] == 30 and len(found) == record["frames"] > 10
    label(engine, motion_jpeg(tmp_path / "file.mkv", pictures), tmp_path / "file")
    expected = frames(tmp_path / "file" / "file.mkv")[1]
    where = 0  # in order, some left out
    for picture in found:
        where = next(i for i in range(where, 30) if np.array_equal(expected[i], picture)) + 1


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_live_connection_that_is_lost_is_opened_again_and_what_was_missed_leaves_its_gap(
    exports, tmp_path, serve, comes_back
):
    """A camera that drops the connection twice, refuses one attempt between, and then ends for good."""
    source = film(tmp_path / "a.ts", 60, (96, 128), options={"preset": "ultrafast", "g": "1"})
    parts, requests = in_ts_parts(source), []
    spans = [(0, 30), None, (30, 60), (0, 30)] if comes_back else [(0, 30)]

    class Camera(Quiet):
        def do_GET(self):
            requests.append(self.path)
            span = spans[len(requests) - 1] if len(requests) <= len(spans) else None
            self.send_response(200 if span else 503)
            self.send_header("Content-Length", "1000000000" if span else "0")  # lost, not ended
            self.end_headers()
            if span:
                paced(bytes, self.wfile.write, parts[slice(*span)], 40)

    options = "--live", "--reconnect", "3"
    done, (record,) = label(exports / "narrow.engine", serve(Camera) + "/live", tmp_path / "o", *options, ok=1)
    # After half a second, one more, and what is left of three.
    assert "it ends at " in record["error"] and 1 <= len(requests) - len(spans) <= 3, "it is not tried for ever"
    assert record.get("reconnected", 0) == (2 if comes_back else 0)
    assert done.stderr.count("has lost its connection") == 1 and "tried again for 3 s" in done.stderr
    times, found = frames(tmp_path / "o" / "live.mkv")
    assert len(found) == record["frames"] and times == sorted(set(times))
    if comes_back:
        decoded = record["frames"] + record["dropped"]
        assert decoded > 10
        assert decoded * 1001 / 30000 + 1.5 < times[-1] < 60, "half a second and a second and a half were waited"


@pytest.mark.parametrize("what", ["a file", "no frame"])
def test_a_live_address_that_is_no_camera_is_not_read_for_ever(exports, tmp_path, serve, what):
    """A finite body without a length, which is the same each time; and headers that no picture follows."""
    content = film(tmp_path / "a.ts", 20, (48, 64), options={"preset": "ultrafast", "g": "5"}).read_bytes()
    requests = []

    class Finite(Quiet):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(content if what == "a file" or len(requests) == 1 else content[:1316])

    options = "--live", "--reconnect", "60" if what == "a file" else "3"
    _, (record,) = label(exports / "narrow.engine", serve(Finite) + "/clip", tmp_path / "o", *options, ok=1)
    if what == "a file":
        assert "byte for byte the same" in record["error"] and "--no-live reads it once" in record["error"]
        assert record["reconnected"] == 1 and record["frames"] + record["dropped"] == 40
    else:
        assert "it ends at " in record["error"] and record["frames"] + record["dropped"] == 20


def test_a_file_over_http_goes_on_where_it_was_lost(exports, tmp_path, serve):
    source = film(tmp_path / "a.mkv", 60, (96, 128), options={"preset": "ultrafast", "g": "12"})
    content, requests = source.read_bytes(), []

    class Dropping(Quiet):
        def do_GET(self):
            start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
            requests.append(start)
            self.send_response(206 if start else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            with suppress(OSError):
                end = len(content) if len(requests) > 3 else start + len(content) // 3
                self.wfile.write(content[start:end])

    label(exports / "narrow.engine", source, tmp_path / "file")
    address = serve(Dropping) + "/a.mkv"
    done, (record,) = label(exports / "narrow.engine", address, tmp_path / "o")
    assert record["frames"] == 60 and "reconnected" not in record and len(requests) >= 3 and not done.stderr
    equal_videos(tmp_path / "o" / "a.mkv", tmp_path / "file" / "a.mkv")
    requests.clear()
    _, (record,) = label(exports / "narrow.engine", address, tmp_path / "p", "--reconnect", "0", ok=1)
    assert record["frames"] < 60 and "it ends at " in record["error"]


@pytest.fixture
def rtsp_server(tmp_path):
    """A real RTSP server of a folder's videos, in real time; (process, address)."""
    pytest.importorskip("aio_rtsp_toolkit", reason="no RTSP server; run: pip install aio-rtsp-toolkit")
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0)), second.bind(("127.0.0.1", 0))
        port, control = first.getsockname()[1], second.getsockname()[1]
    serve = f"server.serve({str(tmp_path)!r}, '127.0.0.1', {port}, control_port={control})"
    words = [sys.executable, "-c", f"import asyncio, aio_rtsp_toolkit.server as server; asyncio.run({serve})"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            break
        time.sleep(0.05)
    yield process, f"rtsp://127.0.0.1:{port}"
    process.kill()
    process.wait()


def test_an_rtsp_source_is_labelled_as_its_file(exports, tmp_path, rtsp_server):
    _, address = rtsp_server
    source = film(tmp_path / "a.mp4", 90, (96, 128), options={"preset": "ultrafast", "g": "12"})
    label(exports / "narrow.engine", source, tmp_path / "file")
    done, (record,) = label(exports / "narrow.engine", f"{address}/a.mp4", tmp_path / "o")
    assert record["frames"] + record["dropped"] == 90 and record["frames"] > 20, done.stderr
    expected, found = labels_by_time(tmp_path / "file" / "a.mkv"), labels_by_time(tmp_path / "o" / "a.mkv")
    assert len(found) == record["frames"] and max(found) >= 80
    # This server counts from 0, which FFmpeg takes for no time at all: it counts from the second picture then.
    for moment, picture in found.items():
        np.testing.assert_array_equal(picture, expected[moment + (moment > 0)])


def test_an_rtsp_source_that_dies_leaves_the_labels_so_far(exports, tmp_path, rtsp_server):
    process, address = rtsp_server
    film(tmp_path / "a.mp4", 900, (96, 128), options={"preset": "ultrafast", "g": "12"})  # half a minute
    words = [*RUN, exports / "narrow.engine", f"{address}/a.mp4", "-o", tmp_path / "o", "--json", "--reconnect", "0"]
    run = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "o/.a.mkv.partial/000000.labels.nut").exists() and run.poll() is None:
        time.sleep(0.02)
    process.kill()
    out, err = run.communicate(timeout=60)
    record, _ = map(json.loads, out.splitlines())
    assert 50 <= record["frames"] + record["dropped"] < 900, err
    assert len(frames(tmp_path / "o/a.mkv")[0]) == record["frames"]
