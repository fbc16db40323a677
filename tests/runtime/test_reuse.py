"""What repeats from frame to frame is not computed twice, and labels are those of whole frames, bit for bit."""

import numpy as np
import pytest
from fcn_deploy.runtime import reuse
from fcn_deploy.runtime.engine_format.engine_file import write_engine
from fcn_deploy.runtime.engine_format.manifest import Manifest
from fcn_deploy.runtime.engine_format.stage import Stage, Upsampling
from fcn_deploy.runtime.planning.grid import Grid
from fcn_deploy.runtime.reuse import changed_blocks, cover, grown
from helpers import command, one_error, onnx_model
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from fcn_deploy import MisuseError, ModelCard, Segmenter

CARD = ModelCard(("a", "b", "c", "d"), stride=4, size_multiple=8)


def engine(path, whole=""):
    """An engine of two stages with features of 8 bits between them, whose sums are exact in any order."""
    random = np.random.default_rng(0)

    def convolution(taken, given, channels, stride, name):
        weights = random.integers(-3, 4, (channels[1], channels[0], 3, 3)).astype(np.float32)
        node = helper.make_node("Conv", [taken, name], [given], strides=[stride] * 2, pads=[1] * 4, kernel_shape=[3, 3])
        return node, {name: weights}

    first, a = convolution("image", "x", (3, 4), 2, "w0")
    second, b = convolution("y", "z", (4, 6), 2, "w1")
    nodes = [
        first, helper.make_node("Relu", ["x"], ["y"]), second,
        helper.make_node("QuantizeLinear", ["z", "scale", "zero"], ["features"]),
    ]  # fmt: skip
    scales = {"scale": np.float32(512), "zero": np.uint8(128)}
    types = TensorProto.FLOAT, TensorProto.UINT8
    early = onnx_model(nodes, a | b | scales, names=("image", "features"), types=types, gives=("N", 6, "h", "w"))
    last, c = convolution("q", "scores", (6, 4), 1, "w2")
    unit = {"one": np.float32(1), "zero": np.uint8(128)}
    nodes = [helper.make_node("DequantizeLinear", ["features", "one", "zero"], ["q"]), last]
    late = onnx_model(
        nodes,
        c | unit,
        names=("features", "scores"),
        types=types[::-1],
        takes=("N", 6, "h", "w"),
        gives=("N", 4, "h", "w"),
    )
    stages = (
        Stage("0.onnx", "image", "features", (8, 8), 8, stride=(4, 4), bytes_per_pixel=40, output_bytes=0.4),
        Stage(
            "1.onnx",
            "features",
            "scores",
            None if whole else (8, 8),
            8,
            whole,
            (4, 4),
            bytes_fixed=10,
            bytes_per_pixel=1.0,
        ),
    )
    manifest = Manifest(CARD, "cpu", "int8", Upsampling("linear", "half_pixel", (4.0, 4.0)), stages, "test")
    write_engine(path, manifest, {"0.onnx": early.SerializeToString(), "1.onnx": late.SerializeToString()})
    return path


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    path = engine(tmp_path_factory.mktemp("reuse") / "m.engine")
    with (
        Segmenter(path, threads=1) as whole, Segmenter(path, threads=1, memory=1_000_000) as tiled,
        Segmenter(path, threads=1, refine=True) as refined,
    ):  # fmt: skip
        yield whole, tiled, refined


def noise(random, height, width):
    return random.integers(0, 256, (height, width, 3), np.uint8)


@st.composite
def streams(draw):
    """Frames of a camera: still, changed in places by much or little, changed all over, of another size."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    frames = [noise(random, *draw(st.tuples(st.integers(1, 150), st.integers(1, 150))))]
    for kind in draw(st.lists(st.sampled_from(["still", "part", "part", "parts", "faint", "all", "size"]), max_size=7)):
        frame = frames[-1].copy()
        height, width = frame.shape[:2]
        for _ in range({"part": 1, "faint": 1, "parts": 5}.get(kind, 0)):
            y, x = random.integers(height), random.integers(width)
            part = frame[y : y + random.integers(1, 40), x : x + random.integers(1, 40)]
            part[:] = part ^ 1 if kind == "faint" else noise(random, *part.shape[:2])
        if kind == "all":
            frame = noise(random, height, width)
        if kind == "size":
            frame = noise(random, *draw(st.tuples(st.integers(1, 150), st.integers(1, 150))))
        frames.append(frame)
    return frames


@settings(max_examples=60, deadline=None)
@given(frames=streams(), which=st.integers(0, 2))
def test_labels_of_any_stream_are_those_of_whole_frames(nets, frames, which):
    net = nets[which]
    found = list(net.map(iter(frames), reuse=True))
    assert len(found) == len(frames)
    for labels, frame in zip(found, frames, strict=True):
        np.testing.assert_array_equal(labels, net(frame))


def test_what_is_kept_of_frames_is_in_the_memory_budget(nets, caplog):
    """Two maps, an image and labels, that a run in tiles does not have beside it."""
    net, frame = nets[0], noise(np.random.default_rng(0), 800, 1000)
    frames = [frame, frame.copy(), frame.copy()]
    path = net.network.path
    with Segmenter(path, threads=1, memory=4_000_000) as small, Segmenter(path, threads=1, memory=10**9) as large:
        assert small.plan(800, 1000).grids
        for each in (small, large):
            for labels in each.map(frames, reuse=True):
                np.testing.assert_array_equal(labels, net(frame))
        stream = reuse.Reuse(large.network)
        assert stream.follow(frame).plan.bytes >= large.plan(800, 1000).bytes + int(800 * 1000 * 4.4)
        assert reuse.Reuse(small.network).follow(frame).unseen
    said = [record.getMessage() for record in caplog.records]
    assert said and all("one by one" in each and len(each) < 300 for each in said)


@pytest.fixture
def counted(nets, monkeypatch):
    """A Segmenter, and the pixels that each of its stages was run on."""
    net, counts = nets[0], [0, 0]
    for index, session in enumerate(net.network.backend._sessions):

        def counting(given, *others, index=index, run=session.run, cell=(1, 16)[index]):
            counts[index] += given.shape[2] * given.shape[3] * cell
            return run(given, *others)

        monkeypatch.setattr(session, "run", counting)
    return net, counts


def test_a_still_camera_costs_one_frame_and_a_change_its_surroundings(counted):
    net, counts = counted
    frame = noise(np.random.default_rng(0), 256, 320)
    for _ in net.map([frame, frame.copy(), frame.copy()], reuse=True):
        pass
    assert counts == [256 * 320] * 2
    counts[:] = [0, 0]
    changed = frame.copy()
    changed[100:108, 200:208] = 0
    other = changed.copy()
    other[9, 9] = 0
    other[200, 300] = 0
    list(net.map([frame, changed, other], reuse=True))
    assert 256 * 320 < counts[0] < 256 * 320 * 1.2 and 256 * 320 < counts[1] < 256 * 320 * 1.3


def test_where_a_stages_result_is_equal_the_next_is_not_run(counted):
    net, counts = counted
    frame = np.full((256, 320, 3), 100, np.uint8)
    faint = frame.copy()
    faint[100, 200] += 1  # is lost in the rounding to 8 bits
    first, second = net.map([frame, faint], reuse=True)
    np.testing.assert_array_equal(first, second)
    assert counts[0] > 256 * 320 and counts[1] == 256 * 320


def test_a_stream_that_changes_all_over_is_run_whole_each_time(counted):
    net, counts = counted
    random = np.random.default_rng(0)
    list(net.map([noise(random, 256, 320) for _ in range(4)], reuse=True))
    assert counts == [4 * 256 * 320] * 2


def test_a_stream_that_changes_all_over_is_soon_compared_no_more_and_looked_at_again(nets, monkeypatch):
    net, random, looks = nets[0], np.random.default_rng(0), []
    monkeypatch.setattr(reuse, "changed_blocks", lambda *given: looks.append(1) or changed_blocks(*given))
    frames = [noise(random, 64, 96) for _ in range(60)]
    frames += [frames[-1]] * 40
    for index, (labels, frame) in enumerate(zip(net.map(frames, reuse=True), frames, strict=True)):
        np.testing.assert_array_equal(labels, net(frame))
        assert index != 59 or len(looks) <= 8
    # Of the frames that are equal all are compared from the first that is seen on.
    assert 5 <= len(looks) - 6 <= 40
    looks.clear()
    list(net.map([frames[0], frames[1]] * 2 + [frames[1]] * 20, reuse=True))
    assert len(looks) >= 14  # unseen were 5


def test_frames_may_be_overwritten_once_their_labels_are_there(nets):
    net, random = nets[0], np.random.default_rng(0)
    camera, kept = noise(random, 90, 120), []

    def frames():
        for index in range(5):
            camera[index * 9 : index * 9 + 5] = index
            kept.append(camera.copy())
            yield kept[-1].copy()

    for index, labels in enumerate(net.map(frames(), reuse=True)):
        np.testing.assert_array_equal(labels, net(kept[index]))
        labels[:] = 99  # the caller's own


def test_pixels_without_data_come_and_go(nets):
    net, random = nets[0], np.random.default_rng(0)
    frame = noise(random, 90, 120)
    hole = np.zeros((90, 120), bool)
    hole[20:40, 30:50] = True
    holed = np.ma.MaskedArray(frame, np.broadcast_to(hole[:, :, None], frame.shape))
    for labels, image in zip(net.map([frame, holed, frame], reuse=True), [frame, holed, frame], strict=True):
        np.testing.assert_array_equal(labels, net(image))


def test_a_frame_that_is_refused_is_raised_in_its_turn_and_the_stream_goes_on(nets):
    net, frame = nets[0], noise(np.random.default_rng(0), 60, 60)
    found = list(net.map([frame, frame[:, :, :2], frame, "none", frame], reuse=True, return_exceptions=True))
    assert [isinstance(each, MisuseError) for each in found] == [False, True, False, True, False]
    np.testing.assert_array_equal(found[4], net(frame))
    with pytest.raises(MisuseError, match="2"):
        list(net.map([frame, frame[:, :, :2]], reuse=True))


def test_a_network_that_is_closed_midway_ends_the_stream(tmp_path):
    frame = np.zeros((40, 40, 3), np.uint8)
    net = Segmenter(engine(tmp_path / "m.engine"))
    stream = net.map((frame for _ in range(40)), reuse=True, return_exceptions=True)
    assert next(stream).shape == (40, 40)
    net.close()
    assert any(isinstance(each, MisuseError) for each in stream)


def test_a_network_that_looks_at_the_whole_image_and_other_results_are_refused(exports, tmp_path):
    path = engine(tmp_path / "whole.engine", whole="GlobalAveragePool pool")
    with Segmenter(path) as net:
        with pytest.raises(MisuseError, match="GlobalAveragePool pool"):
            net.map([], reuse=True)
        with pytest.raises(MisuseError, match="reuse is of labels"):
            net.map([], kind="probabilities", reuse=True)
    with Segmenter(exports / "narrow.onnx") as net, pytest.raises(MisuseError, match="make an engine"):
        net.map([], reuse=True)
    np.save(tmp_path / "a.npy", np.zeros((8, 8, 3), np.uint8))
    done = command("infer", path, tmp_path / "a.npy", "-o", tmp_path / "o", "--reuse", ok=2)
    assert "cannot reuse what repeats (--reuse)" in one_error(done) and len(done.stderr) <= 300


def test_a_video_has_the_same_labels_with_reuse(tmp_path):
    from videos import av, film, frames, label

    path = engine(tmp_path / "m.engine")
    source = film(tmp_path / "v.mkv", 8, (90, 120), "ffv1", "bgr0")
    with av.open(str(source)) as video, av.open(str(tmp_path / "still.mkv"), "w") as still:
        pictures = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        stream = still.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 120, 90, "bgr0"
        for index, picture in enumerate([pictures[0]] * 3 + pictures[:2] * 2):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = index
            still.mux(stream.encode(frame))
        still.mux(stream.encode(None))
    for video in (source, tmp_path / "still.mkv"):
        label(path, video, tmp_path / "plain", "--overlay")
        label(path, video, tmp_path / "reused", "--overlay", "--reuse")
        for name in (f"{video.stem}.mkv", f"{video.stem}.overlay.mp4"):
            one, other = (frames(tmp_path / folder / name, "rgb24") for folder in ("plain", "reused"))
            np.testing.assert_array_equal(one[1], other[1])
            assert one[0] == other[0]


@given(
    st.integers(1, 40), st.integers(1, 40), st.sampled_from(["uint8", "uint16", "float32"]), st.integers(1, 4),
    st.sampled_from([1, 3, 8, 32]), st.data(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_changed_blocks_are_those_with_a_pixel_that_differs(height, width, dtype, channels, unit, data):
    before = np.zeros((height, width, channels), dtype)
    after = before.copy()
    for _ in range(data.draw(st.integers(0, 3))):
        y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
        after[y, x, data.draw(st.integers(0, channels - 1))] = 1
    padded = -(-height // 32) * 32, -(-width // 32) * 32
    found = changed_blocks(before, after, unit, padded)
    expected = np.zeros(found.shape, bool)
    for y, x in np.argwhere((before != after).any(2)):
        expected[y // unit, x // unit] = True
    np.testing.assert_array_equal(found, expected)


@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32), st.floats(0, 1), st.tuples(*[st.integers(0, 3)] * 2)
)
@settings(max_examples=60, deadline=None)
def test_boxes_hold_each_changed_block_once_and_growth_is_a_distance(rows, columns, seed, share, by):
    dirty = np.random.default_rng(seed).random((rows, columns)) < share
    grid = Grid((rows * 32, columns * 32), (rows * 32, columns * 32), (32, 32))
    held = np.zeros(dirty.shape, int)
    for top, bottom, left, right in cover(dirty, 32, grid):
        held[top:bottom, left:right] += 1
    assert held.max(initial=0) <= 1 and (held[dirty] == 1).all()
    far = grown(dirty, by)
    places = np.argwhere(dirty)
    for y, x in np.ndindex(dirty.shape):
        assert far[y, x] == any(abs(y - v) <= by[0] and abs(x - h) <= by[1] for v, h in places)
