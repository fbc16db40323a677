#!/usr/bin/env bash
# pyvips reads a picture that was replaced as it was before: old pixels, at the old size, for as long as the process lives.
#
# Seen with pyvips 3.2.0, pyvips-binary 8.18.7 (libvips 8.18.7), pillow 13.0.0. Another process writes a path three
# times: grey 10 and grey 200 of 64x48 pixels, then grey 90 of 32x32. After each, in one process:
#   Image.new_from_file(path), PNG, TIFF, JPEG, WebP        10, 10, 10, the last one as 64x48
#   new_from_file(path, access="sequential"), thumbnail     10, 200, 90 of PNG, TIFF and JPEG; 10, 10, 10 of WebP
#   new_from_file(path, revalidate=True)                    10, 200, 90
#   new_from_buffer(bytes), Pillow                          10, 200, 90
# libvips keeps the operations it has done and compares their arguments; the file's time, size and inode are not among
# them. That the file was replaced atomically (os.replace) makes no difference. Nothing warns.
#
# Why it matters: a camera's latest.jpg, a mask that a person corrects and saves again, a temporary name that is used for
# each tile: a service labels yesterday's picture, and the new label file seems not to have been written. Scripts that
# end after one picture, and thumbnails of the same file, are right.
# Remedy: revalidate=True, or read the bytes and use new_from_buffer; a new name for each picture.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 pillow==13.0.0 pyvips==3.2.0 \
    pyvips-binary==8.18.7
"$work/venv/bin/python" - "$work" <<'EOF'
import os, subprocess, sys
from pathlib import Path
import numpy as np, PIL, pyvips
from PIL import Image

print("pyvips", pyvips.__version__, "libvips", *(pyvips.version(part) for part in range(3)), "pillow", PIL.__version__)
WRITE = """import os, sys
from PIL import Image
path, level, width, height = sys.argv[1], *map(int, sys.argv[2:])
with open(path + ".new", "wb") as file:
    Image.new("L", (width, height), level).save(file, sys.argv[1].rsplit(".")[-1].replace("tif", "tiff"))
os.replace(path + ".new", path)
"""
ways = {
    "new_from_file": lambda path: pyvips.Image.new_from_file(path),
    "sequential": lambda path: pyvips.Image.new_from_file(path, access="sequential"),
    "revalidate": lambda path: pyvips.Image.new_from_file(path, revalidate=True),
    "buffer": lambda path: pyvips.Image.new_from_buffer(Path(path).read_bytes(), ""),
}
for suffix in ("png", "tif", "jpeg", "webp"):
    for title, read in ways.items():
        path, seen = f"{sys.argv[1]}/{title}.{suffix}", []
        for level, width, height in ((10, 64, 48), (200, 64, 48), (90, 32, 32)):
            subprocess.run([sys.executable, "-c", WRITE, path, *map(str, (level, width, height))], check=True)
            pixels = read(path).numpy()
            seen.append((int(np.round(np.median(pixels))), pixels.shape[1], pixels.shape[0]))
            if np.median(np.asarray(Image.open(path).convert("L"))) != level:
                sys.exit("not seen any more: Pillow reads something else")
        right = seen == [(10, 64, 48), (200, 64, 48), (90, 32, 32)]
        print(suffix, title, *seen)
        stale = title == "new_from_file" or (title == "sequential" and suffix == "webp")
        if right if stale else not right:
            sys.exit(f"not seen any more: {suffix} by {title}")
        if stale and seen != [(10, 64, 48)] * 3:
            sys.exit(f"not seen any more: {suffix} by {title} is something else")
EOF
