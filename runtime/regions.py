"""Images too large to be held: read region by region, labelled from top to bottom, written likewise."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import DeployError, MisuseError
from .files import WriteError, replacing, write_error
from .images import DEFAULT_MAX_PIXELS, check_pixels, fit, picture_of, write_maps, write_png
from .model_card import ModelCard
from .plan import Plan
from .segmenter import Segmenter
from .upsampling import result_bytes

log = logging.getLogger(__name__)

REGION_PIXELS = 64_000_000  # files of more are not read whole
PREVIEW = 4096  # longest side of an overlay, in pixels
JPEG = (6, 7)  # compressions whose YCbCr is decoded to RGB
GEOREFERENCE = (33550, 33922, 34264, 34735, 34736, 34737)  # the tags of the GeoTIFF standard (OGC 19-008r4)


@dataclass(frozen=True)
class Regions:
    """An image file read where it is asked for: `image[top:bottom, left:right]` → [h, w, C] as the card says.

    Attributes:
        shape, dtype: of the whole.
        tags: of a TIFF, to be copied to its labels: (code, type, count, value).
    """

    shape: tuple[int, int, int]
    dtype: np.dtype
    read: Callable[[int, int, int, int], np.ndarray]
    tags: tuple = ()
    ndim: int = 3

    def __getitem__(self, where: tuple[slice, slice]) -> np.ndarray:
        (top, bottom, _), (left, right, _) = (
            part.indices(side) for part, side in zip(where, self.shape[:2], strict=True)
        )
        return self.read(top, bottom, left, right)


def by_regions(path: str | os.PathLike) -> bool:
    """Whether an image file is labelled by this module: a large or georeferenced TIFF, or a large .npy."""
    path = Path(path)
    try:
        if path.suffix.lower() == ".npy":
            shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
            return len(shape) in (2, 3) and shape[0] * shape[1] > REGION_PIXELS
        if path.suffix.lower() not in (".tif", ".tiff"):
            return False
        import tifffile

        with tifffile.TiffFile(path) as file:
            page = file.pages.first
            return page.imagelength * page.imagewidth > REGION_PIXELS or page.is_geotiff
    except Exception:
        return False  # whoever reads it says what is wrong


@contextmanager
def open_regions(path: str | os.PathLike, card: ModelCard, max_pixels: int = DEFAULT_MAX_PIXELS) -> Iterator[Regions]:
    """Open a TIFF (its first image) or a .npy for reading by regions.

    Raises:
        DeployError: not such a file, damaged, or of more than `max_pixels`; when reading: truncated.
        MisuseError: channels or dtype that the card does not allow.
    """
    path = Path(path)
    with ExitStack() as stack:
        try:
            image = _open(path, card, max_pixels, stack)
        except DeployError:
            raise
        except FileNotFoundError as error:
            raise DeployError(f"{path} does not exist") from error
        except Exception as error:  # decoders raise whatever they meet in a hostile file
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DeployError(f"cannot read {path} as an image: {reason}; is it damaged or truncated?") from error
        yield image


def _open(path: Path, card: ModelCard, max_pixels: int, stack: ExitStack) -> Regions:
    if path.suffix.lower() == ".npy":
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.ndim not in (2, 3):
            raise MisuseError(f"{path} holds an array of shape {list(array.shape)}; an image is [H, W] or [H, W, C]")
        return _regions(path, card, max_pixels, array.shape[:2], lambda t, b, le, r: array[t:b, le:r])
    import tifffile

    file = stack.enter_context(tifffile.TiffFile(path))
    if len(file.pages) > 1:
        log.warning("%s holds %d images; only the first is used", path, len(file.pages))
    page = file.pages.first
    size = page.imagelength, page.imagewidth
    tags = tuple((tag.code, tag.dtype, tag.count, tag.value) for tag in page.tags.values() if tag.code in GEOREFERENCE)
    return _regions(path, card, max_pixels, size, _TiffReader(path, page, card).read, tags)


def _regions(path: Path, card: ModelCard, max_pixels: int, size, read, tags=()) -> Regions:
    check_pixels(size[1], size[0], max_pixels, path)
    if 0 in size:
        raise MisuseError(f"{path} has no pixels ({size[0]}×{size[1]})")
    fit(read(0, 1, 0, 1), card, path)  # channels and dtype are told before the work begins
    return Regions(
        (*size, card.channels), np.dtype(card.dtype), lambda *where: fit(read(*where), card, path), tags=tags
    )


class _TiffReader:
    """Decodes the tiles or strips that a region needs, and keeps those which the regions beside it need too."""

    def __init__(self, path: Path, page, card: ModelCard) -> None:
        self.path, self.page, self.card = path, page, card
        kind = getattr(page.photometric, "name", str(page.photometric))
        if kind not in ("MINISBLACK", "MINISWHITE", "RGB", "YCBCR", "PALETTE"):
            raise MisuseError(f"{path} has {kind} colours, which are not read region by region; convert it to RGB")
        if kind == "YCBCR" and int(page.compression) not in JPEG:
            raise MisuseError(
                f"{path} has YCBCR colours without JPEG, which are not read by regions; convert it to RGB"
            )
        if kind != "PALETTE" and page.bitspersample not in (1, 8, 16, 32, 64):
            raise MisuseError(
                f"{path} has {page.bitspersample} bits a sample, which are not read region by region; convert it to 8"
            )
        if (turned := page.tags.valueof(274, 1)) != 1:
            raise MisuseError(
                f"{path} is stored turned (orientation {turned}), which is not read region by region; turn it upright"
            )
        self.kind = kind
        self.separate = page.planarconfig == 2
        self.planes = page.samplesperpixel if self.separate else 1
        if page.is_tiled:
            self.high, self.wide = page.tilelength, page.tilewidth
        else:
            self.high, self.wide = min(page.rowsperstrip, page.imagelength), page.imagewidth
        if self.high < 1 or self.wide < 1 or page.imagedepth != 1:
            raise DeployError(f"{path} has tiles of {self.high}×{self.wide} pixels, or depth; write it again")
        self.rows, self.columns = -(-page.imagelength // self.high), -(-page.imagewidth // self.wide)
        if len(page.dataoffsets) < self.rows * self.columns * self.planes:
            # One run of pixels that is said to be a single strip, or a table that was cut off.
            raise DeployError(
                f"{path} lists {len(page.dataoffsets)} of its {self.rows * self.columns * self.planes} tiles; "
                "is it truncated?"
            )
        self.decoded: dict[int, np.ndarray] = {}
        self.mapped = None
        if page.is_memmappable:
            import tifffile

            mapped = tifffile.memmap(path, page=0, mode="r")
            mapped = mapped[..., None] if mapped.ndim == 2 else mapped
            self.mapped = mapped.transpose(1, 2, 0) if self.separate else mapped

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        if self.mapped is not None:
            return self._colours(self.mapped[top:bottom, left:right])
        page, samples = self.page, self.page.samplesperpixel
        out = np.empty((bottom - top, right - left, samples), page.dtype)
        first_row = top // self.high
        # Regions come from top to bottom.
        for index in [i for i in self.decoded if i // self.columns % self.rows < first_row]:
            del self.decoded[index]
        for plane in range(self.planes):
            for row in range(first_row, -(-bottom // self.high)):
                for column in range(left // self.wide, -(-right // self.wide)):
                    chunk = self._chunk((plane * self.rows + row) * self.columns + column)
                    y, x = row * self.high, column * self.wide
                    a, b = max(top, y), min(bottom, y + self.high)
                    c, d = max(left, x), min(right, x + self.wide)
                    into = out[a - top : b - top, c - left : d - left]
                    (into[:, :, plane : plane + 1] if self.separate else into)[:] = chunk[a - y : b - y, c - x : d - x]
        return self._colours(out)

    def _chunk(self, index: int) -> np.ndarray:
        """[h, w, samples] of one tile or strip."""
        if (found := self.decoded.get(index)) is not None:
            return found
        page, row = self.page, index // self.columns % self.rows
        rows = f"rows {row * self.high} to {min((row + 1) * self.high, page.imagelength) - 1}"
        try:
            file = page.parent.filehandle
            offset, count = page.dataoffsets[index], page.databytecounts[index]
            data = None
            if count:
                file.seek(offset)
                data = file.read(count)
                if len(data) < count:
                    raise DeployError(f"{self.path} is truncated: {rows} are not there; copy it again")
            chunk, _, shape = page.decode(data, index, jpegtables=page.jpegtables)
        except DeployError:
            raise
        except Exception as error:  # decoders raise whatever they meet in a hostile file
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            remedy = "pip install 'fcn-deploy[tiff]'" if "imagecodecs" in reason else "is it damaged?"
            raise DeployError(f"cannot read {rows} of {self.path}: {reason}; {remedy}") from error
        # Sparse files leave tiles away that hold nothing.
        found = np.full(shape[1:], page.nodata, page.dtype) if chunk is None else chunk[0]
        self.decoded[index] = found
        return found

    def _colours(self, pixels: np.ndarray) -> np.ndarray:
        """As `read_image` would have them: palettes and inverted grey resolved, alpha dropped."""
        if self.kind == "PALETTE":
            return (self.page.colormap[:, pixels[:, :, 0]] >> 8).astype(np.uint8).transpose(1, 2, 0)
        if self.kind == "MINISWHITE" and pixels.dtype.kind in "ub":
            pixels = ~pixels  # of unsigned and boolean values: the largest less the value
        if self.kind.startswith("MIN") and pixels.shape[2] == 2 and self.card.channels in (1, 3):
            pixels = pixels[:, :, :1]  # alpha is dropped
        if self.kind in ("RGB", "YCBCR") and self.card.channels == 3:
            return pixels[:, :, :3]
        return pixels[:, :, 0] if pixels.shape[2] == 1 else pixels


def label_regions(
    net: Segmenter,
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    probabilities: str | os.PathLike | None = None,
    overlay: str | os.PathLike | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: Callable[[int, int], None] = lambda done, rows: None,
) -> Plan:
    """Label an image file that need not fit into memory; write a tiled TIFF, as BigTIFF where it is large.

    Rows that are done are kept beside `out` until all are: where a run was interrupted or the disk was full, the same
    call goes on from there, for the same engine and file.

    Args:
        net: an open Segmenter.
        path: a TIFF or .npy.
        out: the TIFF to write, replaced in one step: labels in the card's colours, or masks or values, a page each
            (see runtime.images.write_maps); with the image's georeference.
        probabilities: another, with a page for each class.
        overlay: PNG for a picture of the whole, at most PREVIEW pixels a side.
        max_pixels: refuse an image with more.
        progress: called with the rows that are done, and all.

    Returns:
        How it was run.

    Raises:
        DeployError: the image is damaged, or nothing can be written.
        MisuseError: channels or dtype that the card does not allow.
        KeyboardInterrupt: its text says how far the run came.
    """
    path, out = Path(path), Path(out)
    with open_regions(path, net.card, max_pixels) as image:
        height, width = image.shape[:2]
        plan = net.plan(height, width, bands=True)
        parts = [_Partial.of(net.kind, out, net.card, width)]
        if probabilities is not None:
            parts.append(_Partial.of("probabilities", Path(probabilities), net.card, width))
        kinds = tuple(part.kind for part in parts)
        state = out.parent / f".{out.name}.partial.json"
        identity = _identity(net, path) | {"kinds": ",".join(kinds)}
        done = _rows_done(state, parts, identity)
        progress(done, height)
        try:
            with ExitStack() as stack:
                files = [stack.enter_context(part.path.open("r+b" if done else "w+b")) for part in parts]
                if done < height:
                    for top, results in net.bands_of(image, done, *kinds):
                        for file, part, result in zip(files, parts, results, strict=True):
                            file.seek(top * part.row)
                            rows = result if result.ndim == 2 else result.swapaxes(0, 1)
                            file.write(np.ascontiguousarray(rows).data)
                            file.flush()
                        done = top + results[0].shape[-2]
                        with replacing(state) as temporary:
                            temporary.write_text(json.dumps(identity | {"rows": done}))
                        progress(done, height)
            for part in parts:
                part.write(height, width, net.card, image.tags)
            if overlay is not None:
                step = -(-max(height, width) // PREVIEW)
                rows = [image[row : row + 1, 0:width][:, ::step] for row in range(0, height, step)]
                maps = np.array(parts[0].maps(height, width)[:, ::step, ::step])
                shown = maps[0] if net.kind == "labels" else maps
                write_png(overlay, picture_of(net.kind, np.concatenate(rows), shown, net.card))
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(f"interrupted at row {done} of {height} of {path}; {_AGAIN}") from error
        except (OSError, WriteError) as error:
            said = error if isinstance(error, WriteError) else write_error(out, error)
            raise WriteError(f"{said}; {done} of {height} rows are kept, and {_AGAIN}") from error
        except DeployError as error:
            if not isinstance(error.__cause__, OSError):  # which may pass, as of a network drive
                _forget(state, *(part.path for part in parts))  # the image's own fault: what is kept would not help
            raise
        _forget(state, *(part.path for part in parts))
        return plan


@dataclass(frozen=True)
class _Partial:
    """The rows of a result that are done, in a file of their own: [H, K, W].

    Attributes:
        kind: of result.
        out: what it becomes.
        dtype: of it.
        row: bytes of a row.
    """

    kind: str
    out: Path
    dtype: np.dtype
    row: int

    @classmethod
    def of(cls, kind: str, out: Path, card: ModelCard, width: int) -> "_Partial":
        dtype = np.dtype({"labels": card.label_dtype, "masks": "bool"}.get(kind, "float32"))
        return cls(kind, out, dtype, width * result_bytes(kind, card))

    @property
    def path(self) -> Path:
        return self.out.parent / f".{self.out.name}.partial"

    def maps(self, height: int, width: int) -> np.ndarray:
        """All of it, [K, H, W], read where it is asked for."""
        count = self.row // (width * self.dtype.itemsize)
        return np.memmap(self.path, self.dtype, "r", shape=(height, count, width)).swapaxes(0, 1)

    def write(self, height: int, width: int, card: ModelCard, tags: tuple) -> None:
        options, names = {}, card.score_names
        if self.kind == "labels":
            names = ("labels",)
            if self.dtype == np.uint8:
                colormap = np.zeros((3, 256), np.uint16)
                colormap[:, : len(card.colors)] = np.asarray(card.colors, np.uint16).T * 257
                options = {"photometric": "palette", "colormap": colormap}
        write_maps(self.out, self.maps(height, width), names, tiled=True, tags=tags, **options)


_AGAIN = "the same command with --resume goes on from there"


def _forget(*paths: Path) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _identity(net: Segmenter, path: Path) -> dict[str, str]:
    """What the rows that are done belong to."""
    stat = path.stat()
    members = json.dumps(dict(net.manifest.members), sort_keys=True) if net.manifest else str(net.path.stat())
    members += net.card.to_json() + (" refined" if net.refine else "")  # thresholds and colours
    return {
        "image": f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}",
        "engine": hashlib.sha256(members.encode()).hexdigest(),
    }


def _rows_done(state: Path, parts: Sequence[_Partial], identity: dict[str, str]) -> int:
    """Rows of an earlier run of the same engine on the same file; 0 where there are none."""
    try:
        found = json.loads(state.read_text())
        rows = int(found.pop("rows"))
        there = min(part.path.stat().st_size // part.row for part in parts)
        return rows if found == identity and 0 < rows <= there else 0
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return 0
