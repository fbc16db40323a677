"""TIFFs that lie elsewhere and are read by ranges: a path on this machine stands for one, and holds nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_files: dict[Path, IO[bytes]] = {}


@contextmanager
def standing_for(path: Path, file: IO[bytes]) -> Iterator[None]:
    """In the block `path`, an empty file, is read from `file`: an open, seekable one, by one thread at a time."""
    _files[path] = file
    try:
        yield
    finally:
        del _files[path]


def opened(path: Path) -> Path | IO[bytes]:
    """What tifffile is to open for a path: the path, or the file that it stands for, at its start."""
    file = _files.get(path)
    if file is None:
        return path
    file.seek(0)
    return file
