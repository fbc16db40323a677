"""What TensorRT made of a network: the layers of a plan with their data types, as the builder's verbose log lists them.

With detailed profiling the log has a line for each layer, GPU or not: `Name: …, LayerType: …, Inputs: [ { …, Datatype:
Half, … }], Constants: […], Outputs: [ … ], TacticName: …`.
"""

import re
from collections import Counter
from collections.abc import Iterable

from fcn_deploy.calibration.report.engine_report import PlanLayer

FLOATS = ("Float", "Half", "BFloat16")
_NAMES = {"FP32": "Float", "FP16": "Half", "BF16": "BFloat16"}  # TensorRT's → those of TensorRT for RTX
# What queues no work: the shapes of what comes, and streams that wait for each other.
_NO_WORK = ("shape_call", "signal", "wait", "ShapeHostToDevice", "NoOp")
_LINE = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), Inputs: \[(?P<inputs>.*?)\], (?:Constants|Outputs): \["
)
_CONVOLUTION = re.compile(r"corr|conv", re.IGNORECASE)
_FUSED_CONVOLUTION = re.compile(r"__myl_(Corr|Fc)")  # compiled with what comes after it; Fc: of 1 × 1 pixels
_REFORMAT = re.compile(r"reformat|__myl_(Move|Tran|Cast)+_", re.IGNORECASE)


def layers_of(lines: Iterable[str]) -> tuple[PlanLayer, ...]:
    """The layers that the lines of the builder's message tell of, of the first profile: the others have the same."""
    found: list[PlanLayer] = []
    matches = [(line, match) for line in lines if (match := _LINE.match(line))]
    others = {_part(match["name"]) for _, match in matches if "[profile " in match["name"]} - {None}
    for line, match in matches:
        if match["kind"] in _NO_WORK or "[profile " in match["name"] or _part(match["name"]) in others:
            continue
        outputs = re.search(r"Outputs: \[(.*?)\], (?:ParameterType|TacticName|StreamId)", line)
        gives = outputs[1] if outputs is not None else ""
        found.append(PlanLayer(match["name"], match["kind"], _types(match["inputs"]), _types(gives)))
    return tuple(found)


def _part(name: str) -> str | None:
    """The part of the network that was compiled as one, in whose name a layer's ends; it is of one profile."""
    found = re.search(r"_myl(\d+)_\d+$", name)
    return found and found[1]


def _types(text: str) -> tuple[str, ...]:
    """Data types, as TensorRT for RTX names them: `Half`.

    TensorRT says it with the format, by names of its own: `Format/Datatype: Thirty-two wide … row major Int8 format`.
    """
    found = []
    for said in re.findall(r"Datatype: (\w[^,}]*)", text):
        name = re.search(r"\b(FP32|FP16|BF16|FP8|FP4|U?[Ii]nt\d+|Bool)\b", said)
        found.append(_NAMES.get(name[1], name[1]) if name else said.split()[0])
    return tuple(found)


def is_convolution(layer: PlanLayer) -> bool:
    named = _CONVOLUTION.search(layer.kind) or _FUSED_CONVOLUTION.match(layer.name)
    return bool(named) and not _REFORMAT.search(layer.name)


def is_reformat(layer: PlanLayer) -> bool:
    """Whether a layer moves or casts, and computes nothing."""
    return bool(_REFORMAT.search(layer.name) or _REFORMAT.search(layer.kind))


def gives_float(layer: PlanLayer) -> bool:
    """Whether a layer gives floating point of 16 bits or more."""
    return any(kind in FLOATS for kind in layer.gives)


def convolutions_by_type(layers: Iterable[PlanLayer]) -> dict[str, int]:
    """Type in and out → how many convolutions: {"Int8 → Float": 52}."""
    return dict(
        Counter(
            f"{layer.takes[0] if layer.takes else '?'} → {layer.gives[0] if layer.gives else '?'}"
            for layer in layers
            if is_convolution(layer)
        ).most_common()
    )


def summary(layers: Iterable[PlanLayer]) -> str:
    """In one line: how many layers, of which types the convolutions, and what else there is."""
    layers = tuple(layers)
    convolutions = [f"{count} convolutions {types}" for types, count in convolutions_by_type(layers).items()]
    reformats = sum(is_reformat(layer) for layer in layers)
    others = len(layers) - reformats - sum(is_convolution(layer) for layer in layers)
    return f"{len(layers)} layers: {', '.join([*convolutions, f'{reformats} reformats', f'{others} others'])}"


def advice(layers: Iterable[PlanLayer], precision: str) -> str:
    """What to say of INT8 or FP8 that the plan does not keep: "" where its convolutions hand it on to each other."""
    types = convolutions_by_type(layers)
    low = {name: count for name, count in types.items() if not name.startswith(FLOATS)}
    wide = sum(count for name, count in low.items() if name.rpartition("→ ")[2] in FLOATS)
    if precision not in ("int8", "fp8") or not types:
        return ""
    said = precision.upper()
    if not low:
        return f"{said}: none of the plan's convolutions takes {said}; --fp16 builds a plan of less work"
    if 2 * wide > sum(low.values()):
        return (
            f"{said}: {wide} of {sum(types.values())} convolutions of this plan take it and give float, with layers "
            "of their own between; FP16 (--fp16) is likely faster: compare by verify-engine"
        )
    return ""
