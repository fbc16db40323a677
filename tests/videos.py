"""Small videos, and what is in label videos."""

from fractions import Fraction

import numpy as np
from helpers import command, label_records, needs, photo
from PIL import Image

av = needs("av")
NTSC = Fraction(30000, 1001)


def film(path, count=10, size=(48, 64), codec="libx264", pixels="yuv420p", rotate=0, step=1, options=None):
    """Write a video of a photograph that moves; frame i has the time i · step / 29.97 s."""
    scene = photo(size[0] + 32, size[1], 3)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=NTSC, options=options or {})
        stream.width, stream.height, stream.pix_fmt = size[1], size[0], pixels
        if rotate:
            stream.set_display_rotation(rotate)
        for index in range(count):
            top = index % 32
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(scene[top : top + size[0]]), format="rgb24")
            frame.pts, frame.time_base = index * step, 1 / NTSC
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def motion_jpeg(path, pictures):
    """A Motion JPEG video of these files' bytes, one a frame, 10 a second."""
    height, width = np.asarray(Image.open(pictures[0])).shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuvj420p"
        for index, picture in enumerate(pictures):
            content = picture if isinstance(picture, bytes) else picture.read_bytes()
            packet = av.Packet(content)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, index, index, Fraction(1, 10)
            packet.is_keyframe = True
            container.mux(packet)
    return path


def frames(path, kind="gray"):
    with av.open(str(path)) as container:
        found = [(float(frame.time), frame.to_ndarray(format=kind)) for frame in container.decode(video=0)]
    return [time for time, _ in found], [frame for _, frame in found]


def label(engine, source, out, *options, ok=0):
    done = command("infer", engine, source, "-o", out, "--json", *options, ok=ok)
    return done, label_records(done)
