"""Pictures of more than 8 bits a sample of which Pillow decodes 8 (16-bit colour PNG and PNM, JPEG 2000, AVIF), and of
fewer, which it spreads over 0 to 255."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DeployError
from ..extras import need

if TYPE_CHECKING:
    from PIL import Image as Pictures

HEAD = 4096  # bytes in which a file says how many bits it has


def bits_of(path: Path, picture: "Pictures.Image") -> int:
    """Bits of a sample that the file says it has, where Pillow does not decode all of them; 0: where it does."""
    if picture.format not in ("PNG", "PPM", "JPEG2000", "AVIF"):
        return 0
    with path.open("rb") as file:
        head = file.read(HEAD)
    found = 0
    if picture.format == "PNG":
        found = head[24] if head[12:16] == b"IHDR" else 0
    elif picture.format == "PPM":
        tiles = getattr(picture, "tile", None)
        maximum = tiles[0][3] if tiles else None
        found = int(maximum[1]).bit_length() if isinstance(maximum, tuple) and len(maximum) == 2 else 0
    elif picture.format == "JPEG2000":
        place = head.find(b"\xff\x4f\xff\x51") + 42  # Ssiz of the codestream (ISO/IEC 15444-1, A.5.1)
        found = (head[place] & 127) + 1 if 42 <= place < len(head) else 0
    elif picture.format == "AVIF":
        place = head.find(b"av1C") + 6  # high_bitdepth, twelve_bit (AV1 in ISOBMFF, 2.3.3)
        found = (12 if head[place] & 32 else 10) if 6 <= place < len(head) and head[place] & 64 else 0
    exact = picture.mode.startswith("I;16") or (picture.format == "PPM" and found == 16 and picture.mode == "I")
    return 0 if found <= 8 or exact else found


def few_bits_of(path: Path, picture: "Pictures.Image") -> int:
    """Bits of a sample that Pillow will spread, before it is loaded: of a grey PNG of 2 or 4, a PNM of 2 to 7; else 0.

    A PNM whose largest number is none of so many bits is left as Pillow makes it.
    """
    if picture.format == "PNG" and picture.mode == "L":
        with path.open("rb") as file:
            bits = file.read(25)[24]
        return bits if bits < 8 else 0
    tiles = getattr(picture, "tile", None)
    if picture.format == "PPM" and picture.mode in ("L", "RGB") and tiles and isinstance(tiles[0][3], tuple):
        largest = int(tiles[0][3][-1])
        return largest.bit_length() if 1 < largest < 255 and largest & (largest + 1) == 0 else 0
    return 0


def not_spread(pixels: NDArray[Any], bits: int) -> NDArray[Any]:
    """uint8 of which Pillow has spread so many bits, as they were stored; alpha, [H, W, 2] or [H, W, 4], stays."""
    if pixels.ndim == 3 and pixels.shape[2] in (2, 4):
        return np.concatenate([not_spread(pixels[:, :, :-1], bits), pixels[:, :, -1:]], axis=2)
    stored: NDArray[Any] = np.rint(pixels * ((2**bits - 1) / 255)).astype(np.uint8)
    return stored


def read_deep(path: Path, kind: str) -> NDArray[Any]:
    """All bits of a picture, uint16 [H, W] or [H, W, bands], as stored.

    Raises DeployError where imagecodecs is not installed, and what decoders raise.
    """
    if kind == "PPM":
        return _pnm(path)
    decoders = {"PNG": "png_decode", "JPEG2000": "jpeg2k_decode", "AVIF": "avif_decode"}
    pixels: NDArray[Any] = getattr(need("imagecodecs", "tiff"), decoders[kind])(path.read_bytes())
    return pixels


def _pnm(path: Path) -> NDArray[Any]:
    """A binary grey or colour PNM of two bytes a sample."""
    content = path.read_bytes()
    words: list[bytes] = []
    place = 0
    while len(words) < 4:
        line = content[place : content.index(b"\n", place) + 1]
        place += len(line)
        words += line.partition(b"#")[0].split()
    kind, width, height = words[0], int(words[1]), int(words[2])
    bands = {b"P5": 1, b"P6": 3}.get(kind)
    if bands is None or len(words) > 4:
        raise DeployError(f"{path} is a PNM in text, of which 8 bits are read; convert it to .png or .tif")
    return np.frombuffer(content, ">u2", height * width * bands, place).reshape(height, width, bands).astype(np.uint16)
