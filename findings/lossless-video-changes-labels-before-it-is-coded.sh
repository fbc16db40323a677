#!/usr/bin/env bash
# Labels in a lossless video (FFV1, HuffYUV) change class, because they are turned into 4:2:0 colours before the codec.
#
# Seen with av 18.1.0, imageio 2.38.1, imageio-ffmpeg 0.8.1, opencv-python-headless 5.0.0.93. 11 classes as grey frames in
# blocks of 16x16; how many pixels cv2.VideoCapture (and imageio, and PyAV as rgb24) reads as another class:
#   written by                                        stored as         another class
#   imageio.get_writer(codec="ffv1")                  yuv420p           36 %
#   PyAV add_stream("ffv1"), frames of format gray    yuv420p           36 %
#   OpenCV VideoWriter HFYU, isColor=False            yuv422p           36 %
#   OpenCV VideoWriter FFVH, isColor=True             yuv420p           91 %
#   OpenCV VideoWriter FFV1 or png, either way        gray, bgra, …     none
#   PyAV with stream.pix_fmt = "gray"                 gray              none
#   imageio with pixelformat="gray"                   gray              none
# Grey 0 to 255 becomes 16 to 235 on the way, and back: 126 of the 256 values come back as another one, and the classes 4,
# 5, 6, 7 as 3, 4, 5, 6. The codec then keeps this to the bit. No warning; in a video of a photograph nobody sees it.
#
# Why it matters: label videos are how predictions and ground truth of drives and surgery are kept, and "ffv1" is what one
# is told to take. A few classes are always their neighbour, with perfect edges: it looks like confusion of the network.
# Remedy: ask for the pixel format (gray), read the first frame back, and compare it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 av==18.1.0 imageio==2.38.1 \
    imageio-ffmpeg==0.8.1 opencv-python-headless==5.0.0.93
"$work/venv/bin/python" -W ignore - "$work" <<'EOF'
import sys
from importlib.metadata import version
import av, cv2, imageio, numpy as np

print(*(f"{name} {version(name)}" for name in ("av", "imageio", "imageio-ffmpeg", "opencv-python-headless")))
blocks = (np.arange(44, dtype=np.uint8) % 11).reshape(4, 11)
labels = blocks.repeat(16, 0).repeat(16, 1)


def by_imageio(path, **options):
    with imageio.get_writer(path, fps=10, codec="ffv1", **options) as writer:
        for _ in range(3):
            writer.append_data(labels)


def by_pyav(path, pix_fmt=None):
    with av.open(path, "w") as file:
        stream = file.add_stream("ffv1", rate=10)
        stream.width, stream.height = 176, 64
        if pix_fmt:
            stream.pix_fmt = pix_fmt
        for frame in [av.VideoFrame.from_ndarray(labels, format="gray") for _ in range(3)] + [None]:
            file.mux(stream.encode(frame))


def by_opencv(path, codec, color):
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*codec), 10, (176, 64), isColor=color)
    for _ in range(3):
        writer.write(np.dstack([labels] * 3) if color else labels)
    writer.release()


ways = {
    "imageio ffv1": (by_imageio, {}, 0.36, "yuv420p"),
    "imageio ffv1, pixelformat gray": (by_imageio, {"pixelformat": "gray"}, 0, "gray"),
    "PyAV ffv1": (by_pyav, {}, 0.36, "yuv420p"),
    "PyAV ffv1, pix_fmt gray": (by_pyav, {"pix_fmt": "gray"}, 0, "gray"),
    "OpenCV HFYU, grey": (by_opencv, {"codec": "HFYU", "color": False}, 0.36, "yuv422p"),
    "OpenCV FFVH, colour": (by_opencv, {"codec": "FFVH", "color": True}, 0.91, "yuv420p"),
    "OpenCV FFV1, grey": (by_opencv, {"codec": "FFV1", "color": False}, 0, "gray"),
    "OpenCV FFV1, colour": (by_opencv, {"codec": "FFV1", "color": True}, 0, "bgra"),
}
for title, (write, options, expected, stored) in ways.items():
    path = sys.argv[1] + ("/labels.avi" if write is by_opencv else "/labels.mkv")
    write(path, **options)
    with av.open(path) as file:
        found = file.streams.video[0].codec_context.pix_fmt
        decoded = next(file.decode(video=0)).to_ndarray(format="rgb24")[..., 0]
    frame = cv2.VideoCapture(path).read()[1][..., 0]
    changed = (frame != labels).mean()
    print(f"{title}: stored as {found}; {changed:.0%} another class by OpenCV, {(decoded != labels).mean():.0%} by PyAV; class 4 is",
          *np.unique(frame[labels == 4]))
    if found != stored or abs(changed - expected) > 0.02 or abs((decoded != labels).mean() - expected) > 0.02:
        sys.exit(f"not seen any more: {title}")
EOF
