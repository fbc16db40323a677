"""Bytes of an image file that lie in memory, as a file that every reader takes."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DeployError

Buffer = bytes | bytearray | memoryview


@contextmanager
def file_of(content: Buffer) -> Iterator[Path]:
    """A path, for the time of the block, under which the bytes are found; on Linux they go to no disk.

    It has no suffix: what the file is, its first bytes say. Errors that name it are raised with "the image" instead.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("image")
        path = Path(f"/proc/self/fd/{descriptor}")
    else:
        descriptor, name = tempfile.mkstemp()
        path = Path(name)
    try:
        with open(descriptor, "wb", closefd=False) as file:  # noqa: PTH123
            file.write(content)
        yield path
    except DeployError as error:
        text = str(error)
        raise type(error)(text.replace(str(path), "the image")) if str(path) in text else error from error
    finally:
        os.close(descriptor)
        if not hasattr(os, "memfd_create"):
            path.unlink(missing_ok=True)
