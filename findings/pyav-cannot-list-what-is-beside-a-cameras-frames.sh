#!/usr/bin/env bash
# PyAV cannot list what is beside a frame of a camera's JPEGs or Motion JPEG: `frame.side_data` raises, the rotation in it
# is not to be had as a matrix, and a mirrored picture is taken for one that is turned.
#
# Seen with av 18.1.0 (FFmpeg 8), numpy 2.4.6, pillow 13.0.0. FFmpeg 8 keeps EXIF beside a decoded frame (kind 31). PyAV
# makes a Python enumeration member of every kind as it lists them, and has none for 31:
#   frame.side_data                       ValueError: 31 is not a valid Type
# Other data of the frame, such as the display matrix that FFmpeg makes of EXIF's orientation, cannot be reached either.
# `frame.rotation` still works, and is -180 for a picture that is mirrored left to right (orientation 2), as for one that
# is upside down (3).
#
# Why it matters: code that turns frames as players do reads the display matrix of each; it stops at the first video of a
# camera that writes EXIF, and at every photograph opened by PyAV.
# Remedy: let FFmpeg's own filter take the unknown data out before they are listed: sidedata=mode=delete:type=31. The
# matrix is there then.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 av==18.1.0 pillow==13.0.0
cd "$work"
"$work/venv/bin/python" - <<'EOF'
import struct
import sys

import av
import numpy as np
from PIL import Image

print("av", av.__version__)
picture = Image.fromarray(np.arange(48 * 64 * 3, dtype=np.uint32).reshape(48, 64, 3).astype(np.uint8))


def opened(orientation):
    exif = Image.Exif()
    exif[0x0110] = "camera"
    if orientation:
        exif[0x0112] = orientation
    picture.save("p.jpg", exif=exif)
    with av.open("p.jpg") as container:
        stream = container.streams.video[0]
        return stream, next(container.decode(stream))


picture.save("plain.jpg")
with av.open("plain.jpg") as container:
    print("without EXIF:", len(next(container.decode(video=0)).side_data), "pieces of data")
rotations = {}
for orientation, matrix in ((None, None), (2, (-1, 0, 0, 1)), (3, (-1, 0, 0, -1)), (6, (0, 1, -1, 0))):
    stream, frame = opened(orientation)
    try:
        frame.side_data
        sys.exit("not seen any more: the data of the frame are listed")
    except ValueError as error:
        rotations[orientation] = frame.rotation
        print(f"orientation {orientation}: {error}; rotation {frame.rotation}")
    graph = av.filter.Graph()
    graph.link_nodes(
        graph.add_buffer(width=frame.width, height=frame.height, format=frame.format.name, time_base=frame.time_base),
        graph.add("sidedata", "mode=delete:type=31"),
        graph.add("buffersink"),
    ).configure()
    graph.push(frame)
    found = [struct.unpack("=9i", bytes(data)) for data in graph.pull().side_data if data.type.name == "DISPLAYMATRIX"]
    found = tuple(value // 65536 for value in (*found[0][:2], *found[0][3:5])) if found else None
    print("  with the filter: the matrix", found)
    if found != matrix:
        sys.exit("not seen any more: the remedy gives another matrix")
if rotations[2] != rotations[3]:
    sys.exit("not seen any more: mirrored and turned pictures have different rotations")
EOF
