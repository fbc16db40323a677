"""Raw tensors of gRPC messages, taken out and put in without a copy.

protobuf copies a field's bytes twice when a message is read and the field asked for, three times when it is set and the
message written, and once more to tell the message's length. All of it together was a third of what a request of 480×640
pixels takes beside the network.
https://protobuf.dev/programming-guides/encoding/
"""

from collections.abc import Iterable

RAW_INPUT, RAW_OUTPUT = 7, 6  # raw_input_contents of ModelInferRequest, raw_output_contents of ModelInferResponse
MOST_FIELDS = 64  # of a request that is looked through here; protobuf itself reads what has more
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # kinds of fields


def without_raw(sent: bytes) -> tuple[bytes, list[memoryview]]:
    """A ModelInferRequest's bytes without its raw inputs, and those, which stay where they are.

    A message that is broken, or has very many fields, is given back as it is: protobuf then says what is wrong.
    """
    view, place = memoryview(sent), 0
    kept: list[memoryview] = []
    raw: list[memoryview] = []
    for _ in range(MOST_FIELDS):
        if place == len(view):
            return b"".join(kept), raw
        start = place
        try:
            tag, place = _varint(view, place)
            kind = tag & 7
            if kind == VARINT:
                _, place = _varint(view, place)
            elif kind == BYTES:
                length, place = _varint(view, place)
                place += length
            else:
                place += {FIXED64: 8, FIXED32: 4}[kind]
        except (IndexError, KeyError):
            break
        if place > len(view):
            break
        if tag == RAW_INPUT << 3 | BYTES:
            raw.append(view[place - length : place])
        else:
            kept.append(view[start:place])
    return sent, []


def with_raw(message: bytes, raw: Iterable[memoryview]) -> bytes:
    """A ModelInferResponse's bytes, with raw outputs added."""
    parts: list[bytes | memoryview] = [message]
    for each in raw:
        parts += [_written(RAW_OUTPUT << 3 | BYTES) + _written(len(each)), each]
    return b"".join(parts)


def _varint(view: memoryview, place: int) -> tuple[int, int]:
    """A number of up to 64 bits, and the place after it. Raises IndexError where there is none."""
    value = 0
    for shift in range(0, 70, 7):
        byte = view[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise IndexError(place)


def _written(value: int) -> bytes:
    """A number as a varint."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)
