"""Bodies of requests that are compressed (RFC 9110, 8.4.1), unpacked within the server's limits."""

import zlib
from collections.abc import Callable

from ..errors import MisuseError
from .room import RefusedError

PACKED = ("gzip", "deflate")  # values of Content-Encoding
EITHER = 32 + zlib.MAX_WBITS  # zlib finds out which of the two it is
FED = 1 << 16  # bytes that are given to zlib at a time: it copies what it has not used
PART = 1 << 20  # bytes that come out of it at a time, at most


def unpacked(body: memoryview, limit: int, more: Callable[[int], None]) -> memoryview:
    """What was compressed.

    Args:
        body: one stream of gzip or zlib.
        limit: bytes that may come out of it.
        more: called with a number of bytes before there is room made for them; raises where there is none.

    Raises:
        RefusedError: more comes out than may.
        MisuseError: it is damaged, cut off, or something else.
    """
    stream, found, place = zlib.decompressobj(EITHER), bytearray(), 0
    try:
        while not stream.eof:
            given: bytes | memoryview = stream.unconsumed_tail
            if not given:
                given = body[place : place + FED]
                place += len(given)
            part = stream.decompress(given, PART)
            if not given and not part:
                raise MisuseError("the request's compressed body ends too early; send all of it")
            more(len(part))
            found += part
            if len(found) > limit:
                raise RefusedError(
                    "too_large", f"the request is longer than the limit of {limit} bytes unpacked; raise --max-body"
                )
    except zlib.error as error:
        raise MisuseError(f"the request's body is no gzip or deflate ({error}); mend its Content-Encoding") from error
    if stream.unused_data or place < len(body):
        raise MisuseError("something follows the request's compressed body; send one stream")
    return memoryview(found)
