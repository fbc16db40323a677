"""Frames as players show them: colours by tags and size, full and limited range, turned and mirrored, every size."""

import io
import logging
import struct
from fractions import Fraction

import numpy as np
import pytest
from fcn_deploy.runtime.errors import DeployError
from fcn_deploy.runtime.images import frames as module
from fcn_deploy.runtime.images.addresses import VIDEO_SUFFIXES
from fcn_deploy.runtime.images.numbers import ReadOptions
from fcn_deploy.runtime.images.video import VideoReader
from helpers import needs, photo
from PIL import Image
from videos import film, frames, label, motion_jpeg

from fcn_deploy import ModelCard, Segmenter

av = needs("av")
CARD = ModelCard(("a", "b"), mean=(128.0,) * 3, std=(60.0,) * 3)
WEIGHTS = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}  # Kr, Kb
COLOURS = np.array(
    [
        (255, 255, 255),
        (0, 0, 0),
        (200, 40, 40),
        (40, 200, 40),
        (40, 40, 200),
        (200, 200, 30),
        (30, 180, 180),
        (90,) * 3,
    ],
    np.uint8,
)  # of patches side by side


def planes(rgb, matrix, full, bits):
    """Luma and chroma of colours, [N, 3], by ITU-R BT.601, BT.709 and BT.2020 themselves (their sections 3)."""
    red, green, blue = rgb.astype(np.float64).T / 255
    kr, kb = WEIGHTS[matrix]
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = (blue - luma) / (2 - 2 * kb), (red - luma) / (2 - 2 * kr)
    unit = 2 ** (bits - 8)
    if full:
        scaled = [luma * (2**bits - 1), *(part * (2**bits - 1) + 128 * unit for part in chroma)]
    else:
        scaled = [luma * 219 * unit + 16 * unit, *(part * 224 * unit + 128 * unit for part in chroma)]
    return [np.rint(part).clip(0, 2**bits - 1).astype(np.uint8 if bits == 8 else np.uint16) for part in scaled]


def patches(path, size, matrix, *, full=False, kind="yuv420p", tag=2, codec="libx264", **stream_options):
    """A clip without loss whose patches have COLOURS by this matrix, tagged with another number where wanted."""
    height, width = size
    bits = 10 if "10" in kind else 8
    with av.open(str(path), "w") as container:
        lossless = {"libx264": {"qp": "0", "preset": "ultrafast"}}.get(codec, {})
        stream = container.add_stream(codec, rate=25, options=lossless | stream_options)
        stream.width, stream.height, stream.pix_fmt = width, height, kind
        if tag != 2:
            stream.codec_context.colorspace = tag
        stream.codec_context.color_range = 2 if full else 1
        frame = av.VideoFrame(width, height, kind)
        for plane, values in zip(frame.planes, planes(COLOURS, matrix, full, bits), strict=True):
            row = np.zeros(plane.line_size // values.itemsize, values.dtype)
            row[: plane.width] = np.repeat(values, -(-plane.width // 8))[: plane.width]
            plane.update(np.tile(row, (plane.height, 1)).tobytes())
        frame.pts, frame.time_base = 0, Fraction(1, 25)
        frame.colorspace, frame.color_range = tag, 2 if full else 1
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def seen(path, card=CARD, **options):
    """The first frame as the network is given it."""
    with VideoReader.open(path, card, ReadOptions(**options)) as reader:
        return reader.image(next(reader.frames({"read": 0.0})))


def colours_seen(path):
    image = seen(path).astype(int)
    centres = (np.arange(8) * 2 + 1) * image.shape[1] // 16
    return image[image.shape[0] // 2, centres]


@pytest.mark.parametrize(
    ("size", "tag", "matrix"),
    [
        ((480, 640), 2, 5), ((576, 720), 2, 5), ((720, 1280), 2, 1), ((1080, 1920), 2, 1), ((720, 960), 2, 1),
        ((576, 1280), 2, 1), ((578, 720), 2, 1),  # untagged: as mpv and VLC decide
        ((720, 1280), 6, 5), ((720, 1280), 5, 5), ((720, 1280), 9, 9), ((480, 640), 1, 1), ((480, 640), 7, 7),
    ],
)  # fmt: skip
@pytest.mark.parametrize("full", [False, True])
def test_colours_are_those_of_the_tags_and_of_the_size_where_there_are_none(tmp_path, size, tag, matrix, full):
    path = patches(tmp_path / "c.mp4", size, matrix, full=full, tag=tag)
    np.testing.assert_allclose(
        colours_seen(path), COLOURS, atol=4
    )  # 8-bit luma and chroma, and the converter's rounding


@pytest.mark.parametrize(
    ("name", "codec", "kind", "full"),
    [
        ("c.mkv", "ffv1", "yuv420p10le", False), ("c.mkv", "ffv1", "yuv444p", False),
        ("c.mkv", "ffv1", "yuv422p10le", True),
        ("c.mp4", "libx264", "yuvj420p", True), ("c.mp4", "libx264", "yuv420p10le", False),
        ("c.mp4", "libx264", "yuv444p", True), ("raw.mkv", "rawvideo", "yuv420p", False),
    ],
)  # fmt: skip
def test_bit_depths_and_ranges_are_kept_apart(tmp_path, name, codec, kind, full):
    path = patches(tmp_path / name, (720, 1280), 1, full=full, kind=kind, codec=codec)
    np.testing.assert_allclose(colours_seen(path), COLOURS, atol=4)


@pytest.mark.parametrize("kind", ["gray", "gray10le"])
def test_grey_of_limited_range_is_spread_where_the_file_says_so(tmp_path, kind):
    frame = av.VideoFrame(64, 48, kind)
    shift = 2 if "10" in kind else 0
    row = np.repeat(np.uint16([16, 126, 235, 255]) << shift, 16).astype(np.uint16 if shift else np.uint8)
    for plane in frame.planes:
        plane.update(np.tile(np.pad(row, (0, plane.line_size // row.itemsize - 64)), (48, 1)).tobytes())
    for told, expected in ((1, [0, 128, 255, 255]), (2, [16, 126, 235, 255]), (0, [16, 126, 235, 255])):
        frame.color_range = told
        for channels in (1, 3):
            assert module.pixels_of(frame, channels)[5, 8::16, 0].tolist() == expected


@pytest.mark.parametrize(("codec", "kind"), [("qtrle", "argb"), ("prores_ks", "yuva444p10le"), ("ffv1", "bgra")])
def test_alpha_of_0_is_no_data(exports, tmp_path, codec, kind):
    image = np.dstack([photo(48, 64), np.repeat(np.uint8([0, 1, 255, 0]), 16)[None].repeat(48, axis=0)])
    with av.open(str(tmp_path / "a.mkv" if codec == "ffv1" else tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"alpha_bits": "16"} if "prores" in codec else {})
        stream.width, stream.height, stream.pix_fmt = 64, 48, kind
        for index in range(2):
            frame = av.VideoFrame.from_ndarray(image, format="rgba")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    path = next(tmp_path.glob("a.*"))
    for channels in (1, 3):
        card = ModelCard(("a", "b"), channels=channels, mean=(128.0,) * channels, std=(60.0,) * channels)
        found = np.ma.getmaskarray(seen(path, card))
        assert found.shape == (48, 64, channels) and (found.any(axis=2) == (image[:, :, 3] == 0)).all()
    if codec == "qtrle":
        label(exports / "narrow.engine", path, tmp_path / "o")
        for labels in frames(tmp_path / "o" / "a.mkv")[1]:
            np.testing.assert_array_equal(labels == 255, image[:, :, 3] == 0)


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_alpha_that_is_stored_apart_is_read_where_a_decoder_is_there_and_else_said(
    tmp_path, caplog, monkeypatch, codec
):
    """As browsers' and stickers' WebM has it: FFmpeg's encoders store it beside each frame."""
    path = tmp_path / "a.webm"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"auto-alt-ref": "0", "crf": "4", "b": "2M"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuva420p"
        picture = np.dstack([photo(48, 64, 3), np.full((48, 64), 255, np.uint8)])
        picture[:, :32, 3] = 0
        for index in range(3):
            frame = av.VideoFrame.from_ndarray(picture, "rgba").reformat(format="yuva420p")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    hidden = np.ma.getmaskarray(seen(path))
    assert hidden[:, :30].all() and not hidden[:, 34:].any() and not caplog.records
    monkeypatch.setattr(av, "codecs_available", frozenset({"vp8", "vp9"}))
    assert not np.ma.is_masked(seen(path))
    assert "a.webm has alpha, which PyAV reads with libvpx" in caplog.messages[0]


def test_motion_jpeg_is_of_full_range_and_bt601_at_any_size(tmp_path):
    from PIL import Image

    rows = np.repeat(COLOURS, 160, axis=0)[None].repeat(720, axis=0)
    Image.fromarray(rows).save(tmp_path / "p.jpg", quality=98)
    path = motion_jpeg(tmp_path / "c.avi", [tmp_path / "p.jpg"])
    np.testing.assert_allclose(colours_seen(path), COLOURS, atol=4)


def test_a_grey_network_is_given_the_luma_of_what_is_seen(tmp_path):
    card = ModelCard(("a", "b"), channels=1, mean=(128.0,), std=(60.0,))
    for size, matrix in (((480, 640), 5), ((720, 1280), 1)):
        image = seen(patches(tmp_path / "g.mp4", size, matrix), card)
        centres = (np.arange(8) * 2 + 1) * size[1] // 16
        luma = COLOURS @ np.array([0.299, 0.587, 0.114])
        np.testing.assert_allclose(image[100, centres, 0].astype(int), luma, atol=4)


def test_colours_of_a_matrix_that_is_not_read_are_refused_by_its_number(exports, tmp_path):
    path = patches(tmp_path / "c.mkv", (64, 64), 1, tag=8, codec="ffv1", kind="yuv444p")
    _, (record,) = label(exports / "narrow.engine", path, tmp_path / "o", ok=1)
    assert "the matrix 8 of H.273" in record["error"] and len(record["error"]) <= 300


MATRICES = [
    (1, 0, 0, 1),
    (0, 1, -1, 0),
    (-1, 0, 0, -1),
    (0, -1, 1, 0),
    (-1, 0, 0, 1),
    (1, 0, 0, -1),
    (0, 1, 1, 0),
    (0, -1, -1, 0),
]


@pytest.mark.parametrize("matrix", MATRICES)
def test_every_display_matrix_puts_pixels_where_it_says(matrix):
    a, b, c, d = matrix
    image = photo(5, 7)
    shown = module.upright(image, matrix)
    where = np.array([(a * x + c * y, b * x + d * y) for y in range(5) for x in range(7)])
    left, top = where.min(axis=0)
    for (x, y), pixel in zip(where, image.reshape(-1, 3), strict=True):
        np.testing.assert_array_equal(shown[y - top, x - left], pixel)


@pytest.mark.parametrize("matrix", MATRICES[1:5])
def test_a_turned_or_mirrored_video_is_labelled_as_it_is_shown(exports, tmp_path, matrix):
    path = film(tmp_path / "r.mp4", 2, (48, 64))
    plain = frames(path, "rgb24")[1]
    content = path.read_bytes()
    one = 1 << 16
    identity = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    a, b, c, d = (value * one for value in matrix)
    place = content.index(b"tkhd") + 4 + 40  # the matrix of the track's header (ISO/IEC 14496-12, 8.3.2)
    assert content[place : place + 36] == identity
    path.write_bytes(content[:place] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + content[place + 36 :])
    _, (record,) = label(exports / "narrow.engine", path, tmp_path / "o")
    with Segmenter(exports / "narrow.engine") as net:
        for found, picture in zip(frames(record["labels"])[1], plain, strict=True):
            np.testing.assert_array_equal(found, net(module.upright(picture, matrix)))


def test_what_players_show_otherwise_is_said_once(tmp_path, caplog):
    path = tmp_path / "i.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"x264-params": "tff=1:qp=10"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.color_trc = 16
        stream.codec_context.flags |= 1 << 18 | 1 << 29  # interlaced
        for index in range(3):
            frame = av.VideoFrame.from_ndarray(photo(48, 64, index), format="rgb24").reformat(format="yuv420p")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with caplog.at_level(logging.WARNING), VideoReader.open(path, CARD, ReadOptions()) as reader:
        assert len(list(reader.frames({"read": 0.0}))) == 3
    said = [record.getMessage() for record in caplog.records]
    assert [("interlaced" in text, "HDR video (PQ)" in text) for text in said] == [(True, False), (False, True)]
    assert all(str(path) in text for text in said)


def test_frames_of_each_size_have_a_label_video_of_their_own(exports, tmp_path):
    from PIL import Image

    pictures = []
    for index, size in enumerate([(48, 64)] * 3 + [(80, 64)] * 2 + [(48, 64)] + [(33, 47)]):
        Image.fromarray(photo(*size, index)).save(tmp_path / f"{index}.jpeg", quality=95)
        pictures.append(tmp_path / f"{index}.jpeg")
    source = motion_jpeg(tmp_path / "v.avi", pictures)
    done, (record,) = label(exports / "narrow.engine", source, tmp_path / "o", "--overlay")
    assert record["frames"] == 7 and "change from 64x48 to 64x80 at 0.30 s" in done.stderr
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == [
        "v.47x33.mkv", "v.47x33.overlay.mp4", "v.64x80.mkv", "v.64x80.overlay.mp4", "v.mkv", "v.overlay.mp4",
    ]  # fmt: skip
    assert [(part["size"], part["frames"]) for part in record["sizes"]] == [([48, 64], 4), ([80, 64], 2), ([33, 47], 1)]
    found = sorted(
        (time, labels) for part in record["sizes"] for time, labels in zip(*frames(part["labels"]), strict=True)
    )
    _, shown = frames(source, "rgb24")
    np.testing.assert_allclose([time for time, _ in found], np.arange(7) / 10, atol=0.0006)
    with Segmenter(exports / "narrow.engine") as net:
        for (_, labels), picture in zip(found, shown, strict=True):
            np.testing.assert_array_equal(labels, net(picture))


def test_labels_of_a_further_size_replace_nothing_that_was_there(exports, tmp_path):
    from PIL import Image

    for index in range(2):
        Image.fromarray(photo(48 + 32 * index, 64)).save(tmp_path / f"{index}.jpeg")
    source = motion_jpeg(tmp_path / "v.avi", [tmp_path / "0.jpeg", tmp_path / "1.jpeg"])
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "v.64x80.mkv").write_text("precious")
    _, (record,) = label(exports / "narrow.engine", source, tmp_path / "o", ok=1)
    assert "v.64x80.mkv" in record["error"] and [path.name for path in (tmp_path / "o").iterdir()] == ["v.64x80.mkv"]
    label(exports / "narrow.engine", source, tmp_path / "o", "--force")
    assert len(frames(tmp_path / "o" / "v.64x80.mkv")[0]) == 1


def test_a_stream_that_changes_its_format_midway_is_labelled_on(exports, tmp_path):
    """Two transport streams one after the other, of other sizes and chroma, whose times start anew."""
    first = film(tmp_path / "a.ts", 5, step=30).read_bytes()
    second = film(tmp_path / "b.ts", 5, (96, 64), pixels="yuv444p", step=30).read_bytes()
    (tmp_path / "c.ts").write_bytes(first + second)
    done, (record,) = label(exports / "narrow.engine", tmp_path / "c.ts", tmp_path / "o")
    assert {tuple(part["size"]): part["frames"] for part in record["sizes"]} == {(48, 64): 5, (96, 64): 5}
    times = [time for part in record["sizes"] for time in frames(part["labels"])[0]]
    assert np.diff(times).min() > 0.02 and "start anew" in done.stderr


@pytest.mark.parametrize(("times", "expected"), [
    ([0, 40, 80, 0, 40, 80, 0, 40], [0, 40, 80, 81, 121, 161, 162, 202]),  # short clips one after the other
    ([0, 40, 20, 80, 120], [0, 40, 41, 80, 120]),  # one frame that is early
    ([0, 40, 40, 41, 80], [0, 40, 41, 42, 80]),  # times told too coarsely
    ([0, 4000, 0, 40], [0, 4000, 4040, 4080]),
])  # fmt: skip
def test_times_that_start_anew_leave_frames_apart(tmp_path, times, expected):
    with VideoReader.open(film(tmp_path / "a.mkv", 1, codec="ffv1", pixels="bgr0"), CARD, ReadOptions()) as reader:
        reader.rate = Fraction(25)
        (frame,) = reader.frames({"read": 0.0})
        copies = [av.VideoFrame(64, 48, "rgb24") for _ in times]
        for copy, time in zip(copies, times, strict=True):
            copy.pts, copy.time_base = time, frame.time_base
        reader._decoded = lambda: iter(copies)
        assert [frame.pts for frame in reader.frames({"read": 0.0})] == expected


def test_a_value_range_is_that_of_the_frames_and_of_networks_of_more_bits(tmp_path):
    path = film(tmp_path / "v.mp4", 1)
    plain = seen(path)
    np.testing.assert_array_equal(seen(path, input_range=(0, 51)), np.rint(np.minimum(plain / 51.0, 1) * 255))
    wide = ModelCard(("a", "b"), dtype="uint16", mean=(128.0,) * 3, std=(60.0,) * 3)
    np.testing.assert_array_equal(seen(path, wide), plain.astype(np.uint16))
    with pytest.raises(DeployError, match="--input-range percentile"):
        seen(path, input_range="percentile")
    assert np.ma.getmaskarray(seen(path, no_data=float(plain.max()))).any() == (plain == plain.max()).all(2).any()


def test_a_network_of_other_bands_is_refused_before_anything_is_read(tmp_path):
    card = ModelCard(("a", "b"), channels=4, mean=(0.0,) * 4, std=(1.0,) * 4)
    with pytest.raises(DeployError, match="4 channels"):
        seen(film(tmp_path / "v.mp4", 1), card)


@pytest.mark.parametrize(
    ("name", "codec"),
    [("c.mxf", "mpeg2video"), ("c.y4m", "wrapped_avframe"), ("c.vob", "mpeg2video"), ("c.h264", "libx264"),
     ("c.nut", "ffv1"), ("c.3g2", "mpeg4"), ("c.ivf", "libvpx-vp9")],
)  # fmt: skip
def test_single_files_of_every_container_are_read(tmp_path, name, codec):
    assert (tmp_path / name).suffix in VIDEO_SUFFIXES
    film(tmp_path / name, 6, codec=codec)
    with VideoReader.open(tmp_path / name, CARD, ReadOptions()) as reader:
        found = [reader.image(frame) for frame in reader.frames({"read": 0.0})]
        assert not reader.faults()
    assert len(found) == 6
    for index, image in enumerate(found):
        assert abs(image.astype(int) - photo(80, 64, 3)[index : index + 48]).mean() < 30


def test_the_cover_of_a_song_is_no_video(tmp_path):
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        cover, sound = container.add_stream("mjpeg", rate=1), container.add_stream("aac", rate=44100)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4410), np.float32), "fltp", "mono")
        silence.sample_rate = 44100
        picture = av.VideoFrame.from_ndarray(photo(32, 32), "rgb24")
        for stream, given in ((cover, picture), (cover, None), (sound, silence), (sound, None)):
            container.mux(stream.encode(given))
    with (
        pytest.raises(DeployError, match="has no moving pictures, only 2 other streams"),
        VideoReader.open(tmp_path / "song.mp4", CARD, ReadOptions()),
    ):
        pass


@pytest.mark.parametrize(("orientation", "matrix"), [(1, (1, 0, 0, 1)), (2, (-1, 0, 0, 1)), (6, (0, 1, -1, 0))])
def test_motion_jpeg_with_a_cameras_exif_is_read_and_turned(tmp_path, orientation, matrix):
    """PyAV has no name for EXIF beside a frame, and raises where it lists what is there."""
    exif, content = Image.Exif(), io.BytesIO()
    exif[0x0110], exif[0x0112] = "camera", orientation
    Image.fromarray(photo(48, 64, 3)).save(content, "jpeg", quality=95, subsampling=0, exif=exif)
    (tmp_path / "p.jpg").write_bytes(content.getvalue())
    plain = np.asarray(Image.open(content))
    found = seen(motion_jpeg(tmp_path / "e.avi", [tmp_path / "p.jpg"] * 2))
    assert abs(found.astype(int) - module.upright(plain, matrix)).mean() < 2


def test_of_several_streams_the_one_that_players_show_is_labelled_and_named(tmp_path, caplog):
    for default in (0, 1):
        path = tmp_path / f"{default}.mkv"
        with av.open(str(path), "w") as container:
            streams = [container.add_stream("ffv1", rate=25) for _ in range(2)]
            for index, stream in enumerate(streams):
                stream.width, stream.height, stream.pix_fmt = 64 + 16 * index, 48, "yuv420p"
                stream.disposition = av.stream.Disposition.default if index == default else 0
            for index, stream in enumerate(streams):
                picture = av.VideoFrame.from_ndarray(photo(48, 64 + 16 * index), "rgb24")
                container.mux([*stream.encode(picture), *stream.encode(None)])
        assert seen(path).shape == (48, 64 + 16 * default, 3)
        assert f"{path} has 2 streams of pictures, of which stream {default} (ffv1, " in caplog.messages[default]
