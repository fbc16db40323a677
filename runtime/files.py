"""Writing files so that nothing half-written is left behind and no existing output is lost."""

import errno
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import DeployError, MisuseError


def refuse_existing(path: str | os.PathLike[str], force: bool) -> Path:
    """Return `path`, or raise MisuseError where it exists already and `force` is not given.

    Called before long work, so that the refusal does not come after it.
    """
    path = Path(path)
    if path.is_dir():
        raise MisuseError(f"{path} is a folder; name a file to write with -o")
    if path.exists() and not force:
        raise MisuseError(f"{path} exists already; choose another name, or pass --force to replace it")
    return path


def check_writable(path: str | os.PathLike[str]) -> None:
    """Make the parent folder of `path` and raise DeployError where a file cannot be created in it."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise write_error(path, error) from error


@contextmanager
def no_empty_folders(folders: Iterable[Path]) -> Iterator[None]:
    """Remove, when the block ends, those of these folders and of what they are in that it has made and left empty."""
    wanted = {above for folder in set(folders) for above in (folder, *folder.parents)}
    missing = [folder for folder in wanted if not folder.exists()]
    try:
        yield
    finally:
        for folder in sorted(missing, key=lambda each: len(each.parts), reverse=True):
            with suppress(OSError):  # something is in it
                folder.rmdir()


class WriteError(DeployError):
    """A file could not be written: the disk is full, or the folder not ours."""


def write_error(path: str | os.PathLike[str], error: OSError) -> WriteError:
    """One line for a file that could not be written."""
    reason = error.strerror or str(error)
    remedy = "free space there" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "check the folder"
    return WriteError(f"cannot write {path}: {reason}; {remedy}, or choose another place with -o")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends well.

    Where the block raises, the temporary file is removed and a file that was at `path` stays as it was.
    The temporary name keeps the suffix, since some writers choose a format by it.

    Raises:
        DeployError: the folder cannot be made or written, or the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not mkstemp: its files are private (0600), and an output has the permissions of any new file.
        name = path.parent / f".{path.stem[:80]}-{os.urandom(8).hex()}{path.suffix}"
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        temporary = name
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
