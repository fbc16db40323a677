"""The files that a user's words name: images, folders of them, globs."""

import glob
import os
from collections.abc import Container, Sequence
from pathlib import Path

from ..errors import MisuseError

IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".jp2", ".avif", ".tga", ".npy",
))  # fmt: skip
LIST_SUFFIXES = (".txt", ".lst")
_COMMON = (".jpg", ".png", ".tif", ".npy")


def find_images(inputs: Sequence[str | os.PathLike[str]], suffixes: Container[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Files for a list of images, folders (not descended into) and globs (`**` descends), in name order.

    Args:
        inputs: paths and patterns.
        suffixes: what is taken from folders and globs. A file that is named is taken whatever its suffix.

    Raises:
        MisuseError: an input that does not exist, or holds no images.
    """
    found: list[Path] = []
    for given in inputs:
        item, path = os.fspath(given), Path(given)
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes and file.is_file())
            if not files:
                raise MisuseError(f"{item} holds no images; name a folder with some ({', '.join(_COMMON)}, …)")
        elif path.exists():
            files = [path]
        elif glob.has_magic(item):
            matches = sorted(map(Path, glob.glob(item, recursive=True)))  # noqa: PTH207 (absolute patterns too)
            files = [file for file in matches if file.suffix.lower() in suffixes and file.is_file()]
            if not files:
                raise MisuseError(f"{item} matches no images; check the pattern, and quote it")
        else:
            raise MisuseError(f"{item} does not exist; name an image, a folder or a glob")
        found += files
    return list(dict.fromkeys(found))


def find_or_read_list(source: str) -> list[Path]:
    """Files for an image, a folder, a glob, or a list: a text file with one path a line, relative to it (# comments).

    Raises:
        MisuseError: it does not exist, or names no images.
    """
    path = Path(source)
    if not path.is_file() or path.suffix.lower() not in LIST_SUFFIXES:
        return find_images([source])
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
    files = [path.parent / line for line in lines if line and not line.startswith("#")]
    if not files:
        raise MisuseError(f"{source} lists no images; write one path a line")
    return files
