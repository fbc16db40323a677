"""Results as the Open Inference Protocol sends them, and what models and servers say of themselves."""

import base64
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..arrays import AnyArray
from ..engine_format.model_card import ModelCard
from ..errors import MisuseError
from ..head.upsampling import LABEL_KINDS
from ..images.write import label_png
from ..labelling.rle import encode, encode_labels
from .models import Served
from .tensors import INPUT, NAMES, Wanted

NUMBERS_AT_A_TIME = 1 << 14  # written as JSON: between two such parts, others have their turn
PLATFORM = "fcn_deploy_engine"
EXTENSIONS = ("binary_tensor_data",)


@dataclass(frozen=True)
class Output:
    """An output of an answer.

    Attributes:
        name, datatype, shape: as the protocol has them.
        array: its numbers, C-contiguous; None of BYTES.
        element: the one element of BYTES.
        text: whether the element is text, and no file.
        parameters: of the output.
        binary: whether it follows the JSON of a REST answer as bytes.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    array: AnyArray | None = None
    element: bytes = b""
    text: bool = False
    parameters: dict[str, Any] = field(default_factory=dict)
    binary: bool = False

    @property
    def raw(self) -> memoryview:
        """Its bytes, as the binary extension has them."""
        if self.array is None:
            return memoryview(len(self.element).to_bytes(4, "little") + self.element)
        raw: memoryview = self.array.reshape(-1).view(np.uint8).data
        return raw

    def json_data(self) -> Iterator[bytes]:
        """The text of its data, in parts: a flat list; a file in base64."""
        if self.array is None:
            content = self.element.decode() if self.text else base64.b64encode(self.element).decode()
            yield json.dumps([content]).encode()
            return
        flat = self.array.reshape(-1)
        for start in range(0, len(flat), NUMBERS_AT_A_TIME):
            part = flat[start : start + NUMBERS_AT_A_TIME]
            numbers = part.tolist()
            if part.dtype.kind == "f" and not np.isfinite(part).all():  # JSON has neither NaN nor infinities
                numbers = [number if math.isfinite(number) else None for number in numbers]
            yield (b"," if start else b"[") + json.dumps(numbers, separators=(",", ":"))[1:-1].encode()
        yield b"]"


def check_wanted(served: Served, outputs: Sequence[Wanted], binary: bool) -> tuple[Wanted, ...]:
    """What is asked for of a model: what it gives, `binary` or not, unless it is told. Raises MisuseError."""
    outputs = tuple(outputs) or (Wanted(served.network.kind, binary=binary),)
    for each in outputs:
        if each.name not in served.kinds:
            raise MisuseError(
                f"output {each.name[:40]!r}, and {served.name} gives {', '.join(served.kinds)}; name one of these"
            )
        kind = served.network.heads.view(each.name).kind
        if each.format == "png" and kind not in LABEL_KINDS:
            raise MisuseError(f"a PNG of {each.name}; only labels are written as PNG: omit the format")
        if each.format == "rle" and kind not in (*LABEL_KINDS, "masks"):
            raise MisuseError(f"run lengths of {each.name}; only labels and masks have them: omit the format")
    return outputs


def output_of(wanted: Wanted, result: AnyArray, card: ModelCard) -> Output:
    """A result as it is asked for."""
    binary = wanted.binary
    if wanted.format == "png":
        element = label_png(result, card)
        return Output(wanted.name, "BYTES", (1,), None, element, False, {"content_type": "image/png"}, binary)
    if wanted.format == "rle":
        text = json.dumps(run_lengths(result)).encode()
        return Output(wanted.name, "BYTES", (1,), None, text, True, {"content_type": "application/json"}, binary)
    array = np.ascontiguousarray(result)
    return Output(wanted.name, NAMES[array.dtype.name], array.shape, array, binary=binary)


def run_lengths(result: AnyArray) -> list[dict[str, Any]]:
    """COCO's run lengths of the classes that labels [H, W] have, or of each of masks [K, H, W]."""
    if result.ndim == 2:
        return [{"class": label, **rle} for label, rle in encode_labels(result).items()]
    return [{"class": index, **encode(mask)} for index, mask in enumerate(result)]


def shares(result: AnyArray, card: ModelCard) -> list[dict[str, Any]]:
    """How many pixels each class has, of labels [H, W] or masks [K, H, W]; without those that have none.

    The label of no data is called `no data`, and is in no other's share.
    """
    if result.ndim == 2:
        counts = np.bincount(result.reshape(-1), minlength=1)
    else:
        counts = np.array([np.count_nonzero(mask) for mask in result])
    pixels = result.shape[-1] * result.shape[-2]
    if result.ndim == 2 and card.no_data is not None and len(counts) > card.no_data:
        pixels -= int(counts[card.no_data])
    found = []
    for index in map(int, np.flatnonzero(counts)):
        known = index < len(card.classes)
        found.append(
            {
                "class": index,
                "name": card.classes[index] if known else "no data",
                "color": list(card.colors[index]) if known else None,
                "pixels": int(counts[index]),
                "share": round(int(counts[index]) / pixels, 6) if known else None,
            }
        )
    return found


def metadata(served: Served) -> dict[str, Any]:
    """What a model says of itself: the protocol's fields, and under `parameters` what it does not know."""
    card, network = served.card, served.network
    names = network.heads.names
    return {
        "name": served.name,
        "versions": [served.version],
        "platform": PLATFORM,
        "inputs": [
            {
                "name": INPUT,
                "datatype": NAMES[card.dtype],
                "shape": [-1, -1, card.channels],
                "parameters": {"also": "BYTES, shape [1]: an image file"},
            }
        ],
        "outputs": [
            {
                "name": name,
                "datatype": _datatype(view.kind, view.card),
                "shape": [-1, -1] if view.kind in LABEL_KINDS else [view.card.scores, -1, -1],
            }
            for name, view in ((name, network.heads.view(name)) for name in served.kinds)
        ],
        "parameters": {
            **_meaning(card),
            **({"heads": {name: _meaning(network.heads.card_of(name)) for name in names}} if names else {}),
            "stride": card.stride,
            "size_multiple": card.size_multiple,
            "smallest": card.smallest,
            "precision": network.precision,
            "backend": network.backend.name,
        },
    }


def _meaning(card: ModelCard) -> dict[str, Any]:
    """What the results of a head mean."""
    return {
        "classes": list(card.classes),
        "colors": [list(color) for color in card.colors],
        "no_data": card.no_data,
        "kind": card.kind,
        "activation": card.activation,
    }


def _datatype(kind: str, card: ModelCard) -> str:
    if kind in LABEL_KINDS:
        return NAMES[card.label_dtype]
    return "BOOL" if kind == "masks" else "FP32"
