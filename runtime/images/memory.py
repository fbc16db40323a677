"""Bytes of an image file that lie in memory, as a file that every reader takes."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DeployError
from ..files import WriteError
from .tiff import is_tiff

Buffer = bytes | bytearray | memoryview


@contextmanager
def file_of(content: Buffer) -> Iterator[Path]:
    """A path, for the time of the block, under which the bytes are found.

    On Linux they go to no disk, but for TIFFs: tifffile resolves a path to the file it stands for, and what lies in
    memory alone has none. The path has no suffix: what the file is, its first bytes say. Errors that name it are raised
    with "the image" instead. Raises WriteError where there is no room for them.
    """
    named = not hasattr(os, "memfd_create") or is_tiff(bytes(content[:4]))
    descriptor, name = -1, ""
    try:
        if named:
            descriptor, name = tempfile.mkstemp()
        else:
            descriptor = os.memfd_create("image")
            name = f"/proc/self/fd/{descriptor}"
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
    except OSError as error:
        if name:
            _remove(descriptor, name, named)
        raise WriteError(
            f"cannot put the image into a temporary file: {error.strerror or error}; free space there, or name "
            "another folder by TMPDIR"
        ) from error
    try:
        yield Path(name)
    except DeployError as error:
        raise type(error)(str(error).replace(name, "the image")) from error
    finally:
        _remove(descriptor, name, named)


def _remove(descriptor: int, name: str, named: bool) -> None:
    os.close(descriptor)
    if named:
        Path(name).unlink(missing_ok=True)
