"""Decoded frames as pictures: their colours as players show them, upright, and what is to be said of them."""

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DeployError

# ITU-T H.273, table 4 (matrix coefficients), and what FFmpeg's converter calls them.
MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9}
UNSAID = (0, 2, 3)  # RGB (in a frame that is not), unspecified, reserved
BT601, BT709 = 5, 1
LIMITED, FULL = 1, 2  # the range of samples, by FFmpeg's number; 0 is not told
HDR = {16: "PQ", 18: "HLG"}  # H.273, table 3 (transfer characteristics)
WIDENED = np.rint((np.arange(256) - 16) * (255 / 219)).clip(0, 255).astype(np.uint8)  # limited samples at full range
ONE = 1 << 16  # in a display matrix
FRAME_DATA = 64  # kinds of data beside a frame that FFmpeg may number; version 8 has 32


def pixels_of(frame: Any, channels: int) -> NDArray[Any]:
    """A frame upright, as players show it: [H, W, channels] uint8, RGB or grey.

    Samples that are not tagged are BT.709 from 1280 columns or 577 rows on, and BT.601 below, and of limited range, as
    mpv and VLC take them; FFmpeg's converter takes all of them for BT.601. Grey is the luma of BT.601, as of images.

    Raises:
        DeployError: colours of a kind that is not converted.
    """
    kinds: dict[str, Any] = {}
    form = frame.format
    if not form.is_rgb and len(form.components) >= 3:  # luma and chroma
        kinds["src_colorspace"] = matrix_of(frame)
        if frame.color_range == FULL or form.name.startswith("yuvj"):
            kinds["src_color_range"] = FULL
    pixels = frame.to_ndarray(format="rgb24" if channels == 3 else "gray", **kinds)
    if form.name.startswith(("gray", "ya")) and frame.color_range == LIMITED:  # FFmpeg's converter takes grey for full
        pixels = WIDENED[pixels]
    return upright(pixels.reshape(frame.height, frame.width, -1), display_matrix(frame))


def alpha_of(frame: Any) -> NDArray[Any] | None:
    """A frame's alpha upright, [H, W, 1] uint8; None where its format has none."""
    if not any(component.is_alpha for component in frame.format.components):
        return None
    return upright(frame.to_ndarray(format="rgba")[:, :, 3:], display_matrix(frame))


def matrix_of(frame: Any) -> int:
    """FFmpeg's number of what the samples of a frame of luma and chroma are made by. Raises DeployError."""
    told = int(frame.colorspace)
    if told in UNSAID:
        return BT709 if frame.width >= 1280 or frame.height > 576 else BT601
    if told not in MATRICES:
        raise DeployError(
            f"its colours have the matrix {told} of H.273, which is not read; convert it first: ffmpeg -i … -vf "
            "zscale=matrix=709"
        )
    return MATRICES[told]


def with_known_data(av: Any, frame: Any) -> Any:
    """A frame without the data beside its picture that PyAV has no name for, such as a camera's EXIF.

    One such piece and PyAV names none of them, so that what turns a picture is not seen. FFmpeg's own filter takes
    them out.
    """
    kinds = av.sidedata.sidedata.Type
    try:
        frame.side_data  # noqa: B018 (raises)
        return frame
    except ValueError:
        unknown = set(range(FRAME_DATA)) - {kind.value for kind in kinds}
    graph = av.filter.Graph()
    form = frame.format.name
    chain = [graph.add_buffer(width=frame.width, height=frame.height, format=form, time_base=frame.time_base)]
    chain += [graph.add("sidedata", f"mode=delete:type={kind}") for kind in sorted(unknown)]
    chain.append(graph.add("buffersink"))
    graph.link_nodes(*chain).configure()
    graph.push(frame)
    return graph.pull()


def display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """(a, b, c, d), which show the pixel (x, y) at (a·x + c·y, b·x + d·y); the identity where there is none or a turn
    that is not by right angles."""
    a, b, c, d = _matrix_told(frame)
    if not _by_right_angles(a, b, c, d):
        return 1, 0, 0, 1
    return tuple((value > 0) - (value < 0) for value in (a, b, c, d))  # type: ignore[return-value]


def _matrix_told(frame: Any) -> tuple[int, int, int, int]:
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = struct.unpack("=5i", bytes(data)[:20])
            return a, b, c, d
    return ONE, 0, 0, ONE


def _by_right_angles(a: int, b: int, c: int, d: int) -> bool:
    near = ONE // 64  # a degree
    straight = max(abs(b), abs(c)) < near < min(abs(a), abs(d))
    turned = max(abs(a), abs(d)) < near < min(abs(b), abs(c))
    return straight or turned


def upright(pixels: NDArray[Any], matrix: tuple[int, int, int, int]) -> NDArray[Any]:
    """[H, W, C] as a display matrix shows it: turned, mirrored, or both."""
    a, b, c, d = matrix
    if (a, b, c, d) == (1, 0, 0, 1):
        return pixels
    if a == 0:  # columns become rows
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def remarks(frame: Any) -> Iterator[tuple[str, str]]:
    """(kind, remark) of what a frame's labels suffer from, or are not what players show."""
    if frame.interlaced_frame:
        yield (
            "interlaced",
            "is interlaced: a frame holds two moments, line by line, and is labelled as it is; for better labels "
            "deinterlace it first: ffmpeg -i … -vf bwdif",
        )
    if (curve := HDR.get(int(frame.color_trc))) is not None:
        yield (
            "hdr",
            f"is HDR video ({curve}), whose numbers are labelled as they are, paler than players show them; for better "
            "labels convert it to SDR first",
        )
    if not _by_right_angles(*_matrix_told(frame)):
        yield "turned", "is to be shown turned by an angle that is no right one, and is labelled as it is stored"
