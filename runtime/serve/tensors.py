"""Requests of the Open Inference Protocol, whatever carried them: checked before anything is allocated for them.

https://github.com/kserve/open-inference-protocol, and the binary tensor data extension of its REST form.
"""

import binascii
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from ..arrays import AnyArray
from ..errors import MisuseError
from .models import shown

DATATYPES = {"UINT8": "uint8", "UINT16": "uint16", "INT16": "int16", "FP32": "float32"}  # of images, with BYTES
NAMES = {"uint8": "UINT8", "uint16": "UINT16", "int16": "INT16", "float32": "FP32", "bool": "BOOL"}
INPUT = "image"
MOST_OUTPUTS = 16
JSON_LIMIT = 8_000_000  # bytes of JSON: parsing holds up everybody else
FORMATS = ("png", "rle")
LABEL_QUERY = ("model", "version", "output", "format", "page")
Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class Wanted:
    """An output that is asked for.

    Attributes:
        name: of it: a kind of result.
        format: of labels and masks: `png` or `rle`; "": an array.
        binary: whether it follows the JSON of a REST answer as bytes.
    """

    name: str
    format: str = ""
    binary: bool = False


@dataclass(frozen=True)
class InferRequest:
    """What is asked for, and the image.

    Attributes:
        image: [H, W, C], a view of the request's body where that is binary; None where it is a file.
        file: an image file's bytes.
        outputs: asked for; none: what the network gives.
        id: of the request, handed back.
        timeout: seconds in which it must be begun; None: any.
        binary: whether outputs follow the JSON of a REST answer as bytes, where `outputs` names none.
        page: of a file of several images, counted from 0; None: the first.
    """

    image: AnyArray | None
    file: memoryview | None
    outputs: tuple[Wanted, ...] = ()
    id: str = ""
    timeout: float | None = None
    binary: bool = False
    page: int | None = None


@dataclass(frozen=True)
class Given:
    """An input as the protocol has it.

    Attributes:
        name, datatype, shape: of it.
        raw: its bytes; None where `data` has its numbers.
        data: numbers in nested lists, or an image file for BYTES.
        parameters: of it.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: memoryview | None = None
    data: Any = None
    parameters: Parameters = field(default_factory=dict)


def parse_json(body: memoryview, header: int | None) -> InferRequest:
    """A REST request: JSON, and where `header` tells the JSON's length in bytes, binary inputs after it.

    Raises MisuseError.
    """
    length = len(body) if header is None else header
    if not 0 < length <= len(body):
        raise MisuseError(f"the JSON of the request is {length} bytes long, and its body {len(body)}; mend the length")
    if length > JSON_LIMIT:
        raise MisuseError(
            f"the JSON of the request is {length} bytes long, over the limit of {JSON_LIMIT}; send the image as binary "
            "data, or as a file to /label"
        )
    try:
        request = json.loads(bytes(body[:length]))
    except (ValueError, RecursionError) as error:
        raise MisuseError(f"the request is not JSON: {_short(error)}; see /openapi.json") from error
    if not isinstance(request, dict):
        raise MisuseError("the request is not a JSON object; see /openapi.json")
    parameters = _parameters(request, "the request")
    inputs = [_input(each) for each in _list(request, "inputs", 1)]
    outputs = tuple(_wanted(each, parameters) for each in _list(request, "outputs", MOST_OUTPUTS))
    (given,) = _binary(inputs, body[length:])
    id = request.get("id")
    return request_of(given, outputs, "" if id is None else id, parameters)


def request_of(given: Given, outputs: tuple[Wanted, ...], id: object, parameters: Parameters) -> InferRequest:
    """A request of one input. Raises MisuseError."""
    if not isinstance(id, str) or len(id) > 1000:
        raise MisuseError("the request's id is not a text of at most 1000 characters; mend or omit it")
    _check_names(outputs)
    timeout = parameters.get("timeout")
    if timeout is not None and (type(timeout) is not int or not 0 <= timeout < 2**64):
        raise MisuseError(f"timeout {_short(timeout)}; it is a whole number of microseconds")
    image, file = _content(given)
    seconds, binary = timeout / 1e6 if timeout else None, _flag(parameters, "binary_data_output")
    page = page_of(given.parameters.get("page"))
    if page is not None and file is None:
        raise MisuseError(f"page {page} of an array; files alone have pages, sent as BYTES")
    return InferRequest(image, file, outputs, id, seconds, binary, page)


def header_length(text: str | None) -> int | None:
    """The header of a request with binary data, Inference-Header-Content-Length. Raises MisuseError."""
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise MisuseError(f"Inference-Header-Content-Length {text[:40]!r}; it is the length of the JSON in bytes")
    return int(text)


def label_query(text: bytes) -> dict[str, str]:
    """The parameters of /label. Raises MisuseError for one that is not known, or is given twice."""
    found: dict[str, str] = {}
    for name, value in parse_qsl(text.decode("latin-1"), keep_blank_values=True):
        if name not in LABEL_QUERY or name in found:
            wrong = "a second" if name in found else "no"
            known = ", ".join(LABEL_QUERY)
            raise MisuseError(f"/label takes {wrong} parameter {shown(name)}; it has {known}, once each")
        found[name] = value
    return found


def page_of(said: object) -> int | None:
    """Which image of a file of several is wanted: a whole number, or one as text. Raises MisuseError."""
    if said is None:
        return None
    if type(said) in (int, str) and re.fullmatch(r"[0-9]{1,9}", str(said), re.ASCII):
        return int(str(said))
    raise MisuseError(f"page {_short(said)}; it is a whole number from 0 on, which counts the images of the file")


def wanted(name: str, parameters: Parameters, binary: bool) -> Wanted:
    """An output from its name and parameters. Raises MisuseError."""
    format = parameters.get("format", "")
    if format not in ("", *FORMATS):
        raise MisuseError(
            f"format {_short(format)} of the output {shown(name)}; choose {' or '.join(FORMATS)}, or omit it"
        )
    if "classification" in parameters or "shared_memory_region" in parameters:
        raise MisuseError(f"the output {shown(name)} asks for an extension that is not served; omit its parameters")
    return Wanted(name, format, binary)


def _wanted(entry: dict[str, Any], request: Parameters) -> Wanted:
    name = entry.get("name")
    if not isinstance(name, str):
        raise MisuseError("an output has no name; give it one")
    parameters = _parameters(entry, f"the output {shown(name)}")
    binary = _flag(parameters, "binary_data", _flag(request, "binary_data_output"))
    return wanted(name, parameters, binary)


def _flag(parameters: Parameters, name: str, otherwise: bool = False) -> bool:
    """A parameter that is true or false. Raises MisuseError: who wrote 1 or "true" would get the other of the two."""
    found = parameters.get(name)
    if found is None:
        return otherwise
    if type(found) is not bool:
        raise MisuseError(f"{name} {_short(found)}; it is true or false, without quotes")
    return found


def _check_names(outputs: Sequence[Wanted]) -> None:
    """One output of a name and format."""
    if len({(each.name, each.format) for each in outputs}) < len(outputs):
        raise MisuseError("the request asks for an output twice; name each once")


def _input(entry: dict[str, Any]) -> Given:
    name, datatype, shape = entry.get("name"), entry.get("datatype"), entry.get("shape")
    if not isinstance(name, str) or not isinstance(datatype, str):
        raise MisuseError("the input has no name or no datatype; see /openapi.json")
    if not isinstance(shape, list) or not all(type(side) is int for side in shape):
        raise MisuseError(f"shape {_short(shape)} of the input; it is a list of whole numbers")
    return Given(name, datatype, tuple(shape), None, entry.get("data"), _parameters(entry, f"the input {shown(name)}"))


def _binary(inputs: Sequence[Given], rest: memoryview) -> list[Given]:
    """The inputs, with the bytes of those that follow the JSON."""
    found, place = [], 0
    for each in inputs:
        size = each.parameters.get("binary_data_size")
        if size is None:
            found.append(each)
            continue
        if type(size) is not int or not 0 <= size <= len(rest) - place:
            raise MisuseError(
                f"binary_data_size {_short(size)} of the input {shown(each.name)}, and {len(rest) - place} bytes "
                "follow the JSON; mend either"
            )
        if each.data is not None:
            raise MisuseError(f"the input {shown(each.name)} has data in the JSON and after it; omit one of them")
        found.append(Given(each.name, each.datatype, each.shape, rest[place : place + size], None, each.parameters))
        place += size
    if place != len(rest):
        raise MisuseError(f"{len(rest) - place} bytes follow the request that no input has; mend its binary_data_size")
    return found


def _content(given: Given) -> tuple[AnyArray | None, memoryview | None]:
    """The image, or the image file's bytes."""
    if given.name != INPUT:
        raise MisuseError(f"the input is called {shown(given.name)}; this server's is called {INPUT}")
    if any(key.startswith("shared_memory") for key in given.parameters):
        raise MisuseError("the input lies in shared memory, which is not served; send it as binary data")
    if given.datatype == "BYTES":
        return None, _file(given)
    if given.datatype not in DATATYPES:
        raise MisuseError(f"datatype {shown(given.datatype)}; choose {', '.join(DATATYPES)} or BYTES")
    dtype = np.dtype(DATATYPES[given.datatype])
    if not 1 <= len(given.shape) <= 3 or not all(0 < side < 2**31 for side in given.shape):
        raise MisuseError(f"shape {_sides(given.shape)}; an image is [height, width, channels], all above 0")
    count = math.prod(given.shape)
    if given.raw is not None:
        if len(given.raw) != count * dtype.itemsize:
            raise MisuseError(
                f"shape {_sides(given.shape)} of {given.datatype} is {count * dtype.itemsize} bytes, and "
                f"{len(given.raw)} were sent; mend either"
            )
        return np.frombuffer(given.raw, dtype.newbyteorder("<")).reshape(given.shape), None
    return _numbers(given.data, given.shape, dtype), None


def _numbers(data: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> AnyArray:
    """The numbers of a JSON list, nested or flat, as an array of a shape."""
    count = math.prod(shape)
    if not isinstance(data, list):
        raise MisuseError("the input has no data; send a list of numbers, or binary data")
    if _count(data) != count:
        raise MisuseError(f"the input's shape has {count} numbers, and its data {_count(data)}; mend either")
    try:
        found = np.array(data)
    except (ValueError, OverflowError) as error:
        raise MisuseError("the input's data are not lists of equal lengths; send them flat") from error
    if found.ndim > 1 and found.shape != shape:  # of an image that lies on its side, say
        raise MisuseError(
            f"shape {_sides(shape)}, and the input's data are lists of shape {_sides(found.shape)}; mend either, or "
            "send them flat"
        )
    if found.dtype.kind not in ("iuf" if dtype.kind == "f" else "iu"):
        raise MisuseError(f"the input's data are not all {'' if dtype.kind == 'f' else 'whole '}numbers; mend them")
    if dtype.kind != "f":
        limits = np.iinfo(dtype)
        if found.min() < limits.min or found.max() > limits.max:
            raise MisuseError(f"the input's data go from {found.min()} to {found.max()}, outside {dtype}; mend them")
    with np.errstate(over="ignore"):  # becomes infinite, which is no data
        return found.astype(dtype).reshape(shape)


def _count(data: list[Any]) -> int:
    """How many numbers a nested list has. Raises MisuseError where there is anything else in it.

    NumPy would make room for the longest text as often as there are elements.
    """
    kinds = set(map(type, data))
    if kinds == {list}:
        return sum(map(_count, data))
    if list in kinds:
        raise MisuseError("the input's data are not lists of equal lengths; send them flat")
    if not kinds <= {int, float}:
        raise MisuseError("the input's data are not all numbers; mend them")
    return len(data)


def _file(given: Given) -> memoryview:
    """The one element of a BYTES input: an image file."""
    if math.prod(given.shape) != 1 or len(given.shape) > 3 or any(side != 1 for side in given.shape):
        raise MisuseError(f"shape {_sides(given.shape)} of BYTES; send one image file, shape [1]")
    if given.raw is not None:
        # Each element has its length before it, 4 bytes, little-endian.
        told = int.from_bytes(given.raw[:4], "little")
        if len(given.raw) < 4 or told != len(given.raw) - 4:
            raise MisuseError(
                f"the BYTES of the input say that they are {told} bytes, and {max(len(given.raw) - 4, 0)} follow; "
                "each element has its length before it, in 4 bytes"
            )
        return given.raw[4:]
    data = given.data
    while isinstance(data, list) and len(data) == 1:
        data = data[0]
    if isinstance(data, bytes):
        return memoryview(data)
    if not isinstance(data, str):
        raise MisuseError("the BYTES of the input are no text; send the image file in base64, or as binary data")
    try:
        return memoryview(binascii.a2b_base64(data, strict_mode=True))
    except ValueError as error:
        raise MisuseError(f"the BYTES of the input are not base64 ({_short(error)}); or send binary data") from error


def _list(request: Mapping[str, Any], key: str, most: int) -> list[dict[str, Any]]:
    """A list of objects."""
    found = request.get(key)
    if found is None and key == "outputs":
        return []
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise MisuseError(f"{key} of the request are not a list of objects; see /openapi.json")
    if len(found) > most or (key == "inputs" and len(found) != 1):
        limit = "one" if key == "inputs" else f"{most} at most"
        raise MisuseError(f"the request has {len(found)} {key}; this server takes {limit}")
    return found


def _parameters(entry: Mapping[str, Any], owner: str) -> Parameters:
    found = entry.get("parameters")
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise MisuseError(f"the parameters of {owner} are not an object; mend or omit them")
    return found


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:60]}…"


def _sides(shape: Sequence[int]) -> str:
    return _short(list(shape))
