"""The files that a user's words name: images, folders of them, globs."""

import glob
import logging
import os
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path

from ..errors import MisuseError

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".jp2", ".j2k", ".j2c", ".jpx", ".jfif", ".apng", ".dib", ".avif", ".tga", ".btf", ".tf8", ".gtiff", ".lsm", ".npy",
))  # fmt: skip
LIST_SUFFIXES = (".txt", ".lst")
# Pictures that nothing here reads, and the package that does.
UNREAD = {
    suffix: package
    for package, suffixes in {
        "pillow-heif": ".heic .heif .hif", "pydicom": ".dcm .dicom", "nibabel": ".nii .nii.gz", "pynrrd": ".nrrd",
        "SimpleITK": ".mha .mhd", "pillow-jxl-plugin": ".jxl", "psd-tools": ".psd .psb", "OpenEXR": ".exr",
        "rawpy": ".dng .cr2 .cr3 .nef .arw .orf .rw2 .raf", "openslide-python": ".svs .ndpi .mrxs .scn",
        "h5py": ".h5 .hdf5 .nc", "fcn-deploy[gdal]": ".vrt",
        "rasterio": ".img .ecw .ntf .nitf .bil .bip .bsq .asc .ers .pix .hgt .dt2 .sdat",
        "imagecodecs": ".jxr .wdp .jls", "astropy": ".fits .fit .fts", "zarr": ".zarr",
        "czifile": ".czi", "nd2": ".nd2", "readlif": ".lif",
        "numpy": ".npz", "fcn-deploy[video]": ".mp4 .m4v .mov .mkv .avi .webm .mpg .mpeg .ts .m2ts .mts .wmv .flv .mxf",
    }.items()
    for suffix in suffixes.split()
}  # fmt: skip
_COMMON = (".jpg", ".png", ".tif", ".npy")


def find_images(inputs: Sequence[str | os.PathLike[str]], suffixes: Container[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Files for a list of images, folders (not descended into) and globs (`**` descends), in name order.

    Pictures among them that are not read are counted and named in one warning.

    Args:
        inputs: paths and patterns.
        suffixes: what is taken from folders and globs. A file that is named is taken whatever its suffix.

    Raises:
        MisuseError: an input that does not exist, or holds no images.
    """
    return list(_found(inputs, suffixes))


def find_placed(
    inputs: Sequence[str | os.PathLike[str]], suffixes: Container[str] = IMAGE_SUFFIXES
) -> dict[Path, Path]:
    """What `find_images` gives, and of each file the folder that it lies in below the fixed part of its glob.

    It is `.` of a file that is named, and of those of a folder. Errors as of `find_images`, and MisuseError for a glob
    that goes back up behind a wildcard.
    """
    return {
        file: Path() if root is None else _below(file, root, item)
        for file, (root, item) in _found(inputs, suffixes).items()
    }


def _found(inputs: Sequence[str | os.PathLike[str]], suffixes: Container[str]) -> dict[Path, tuple[Path | None, str]]:
    """What `find_images` gives; of each file the fixed part of its glob, None where it is of none, and the input."""
    found: dict[Path, tuple[Path | None, str]] = {}
    for given in inputs:
        item, path, unread, root = os.fspath(given), Path(given), "", None
        if path.is_dir():
            held = sorted(path.iterdir())
            files = [file for file in held if file.suffix.lower() in suffixes and file.is_file()]
            unread = unread_files(item, held, suffixes)
            if not files:
                raise MisuseError(unread or _without_images(item, path, suffixes))
        elif path.exists():
            files = [path]
        elif glob.has_magic(item):
            matches, root = sorted(set(_matches(path))), _fixed_part(path)
            files = [file for file in matches if file.suffix.lower() in suffixes and file.is_file()]
            unread = unread_files(item, matches, suffixes)
            if not files:
                raise MisuseError(unread or f"{item} matches no images; check the pattern, and quote it")
        else:
            raise MisuseError(f"{item} does not exist; name an image, a folder or a glob")
        for file in files:
            found.setdefault(file, (root, item))
        if unread:
            log.warning(unread)
    return found


def _fixed_part(pattern: Path) -> Path:
    """The folder that all matches of a glob lie below."""
    parts = pattern.parts
    first = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])


def _matches(pattern: Path) -> Iterator[Path]:
    """Of a glob; like glob's own, but that would follow links that lead back up, until the system refuses."""
    place = next((place for place, part in enumerate(pattern.parts) if part == "**"), None)
    if place is None:
        yield from map(Path, glob.iglob(str(pattern)))  # noqa: PTH207 (absolute patterns too)
        return
    for top in glob.iglob(str(Path(*pattern.parts[:place]))):  # noqa: PTH207
        for folder in _folders(top):
            yield from _matches(Path(glob.escape(folder), *(pattern.parts[place + 1 :] or "*")))


def _folders(top: str) -> Iterator[str]:
    """A folder, and all below it that are not hidden, behind links too; none within itself."""
    within = {top: {_identity(top)}}
    for folder, inside, _ in os.walk(top, followlinks=True):
        yield folder
        above, inside[:] = within.pop(folder), [name for name in inside if not name.startswith(".")]
        for name in list(inside):
            below = os.path.join(folder, name)  # noqa: PTH118 (as os.walk names it)
            if (identity := _identity(below)) in above:
                inside.remove(name)
            else:
                within[below] = above | {identity}


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = os.stat(folder)  # noqa: PTH116
    except OSError:  # it has gone, and holds nothing
        return -1, -1
    return status.st_dev, status.st_ino


def _below(file: Path, root: Path, item: str) -> Path:
    """The folder of a match, below the fixed part of its glob. Raises MisuseError where it may lie elsewhere."""
    folder = file.parent.relative_to(root)
    if ".." in folder.parts:
        raise MisuseError(
            f"{item} goes back up behind a wildcard, so that results have no place; write it without '..'"
        )
    return folder


def _without_images(item: str, folder: Path, suffixes: Container[str]) -> str:
    """What is wrong with a folder that has no images right in it, and what to do."""
    inside = next((file for file in folder.rglob("*") if file.suffix.lower() in suffixes and file.is_file()), None)
    if inside is not None:
        return (
            f"{item} holds no images, but folders with some, such as {inside}; '{item.rstrip('/')}/**' takes those too"
        )
    return f"{item} holds no images; name a folder with some ({', '.join(_COMMON)}, …)"


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


def package_for(path: Path) -> str | None:
    """The package that reads a file of this name, where nothing here does."""
    name = path.name.lower()
    return UNREAD.get(".nii.gz" if name.endswith(".nii.gz") else path.suffix.lower())


def unread_files(item: str, files: Iterable[Path], suffixes: Container[str]) -> str:
    """What a folder or a glob holds and nothing reads, in one line; "" where there is nothing of it."""
    kinds = Counter(
        (".nii.gz" if file.name.lower().endswith(".nii.gz") else file.suffix.lower(), package)
        for file in files
        if file.suffix.lower() not in suffixes and (package := package_for(file)) and file.is_file()
    )
    if not kinds:
        return ""
    named = ", ".join(f"{count} {suffix} ({package} reads it)" for (suffix, package), count in sorted(kinds.items()))
    return f"{item} holds {kinds.total()} files that are not read here: {named}; convert them to .png or .tif"
