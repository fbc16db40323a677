"""What exporters write into an ONNX of its classes and of how it was shown images: Ultralytics and Deepness."""

import ast
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

NAMES = ("names", "class_names")  # keys of Ultralytics and Deepness
BYTE = 255.0


def told_by_exporter(metadata: Mapping[str, str], channels: int, classes: int) -> Iterator[tuple[dict[str, Any], str]]:
    """Fields of the card that a model's metadata tell, and a line of why, to be read after the model's name.

    Args:
        metadata: of the model, as its file has them.
        channels: of its images.
        classes: that it tells apart. Names of as many are taken, and of no other number.
    """
    for key in NAMES:
        names = _names(metadata.get(key, ""))
        if len(names) == classes == len(set(names)):
            yield {"classes": tuple(names)}, f"names its {classes} classes in its metadata ({key})"
            break
    if (normalisation := _normalisation(metadata, channels)) is not None:
        mean, std, why = normalisation
        yield {"mean": mean, "std": std}, f"is {why}: mean {_shown(mean)}, std {_shown(std)}"


def _names(text: str) -> list[str]:
    """Names of classes, by their numbers, of a dictionary or a list; [] where it is neither."""
    value = _value(text)
    if isinstance(value, dict):
        numbers = {int(key): name for key, name in value.items() if str(key).isdecimal()}
        value = [numbers[place] for place in range(len(numbers))] if set(numbers) == set(range(len(value))) else []
    names = value if isinstance(value, list) else []
    return names if all(isinstance(name, str) and name.strip() for name in names) else []


def _normalisation(metadata: Mapping[str, str], channels: int) -> tuple[list[float], list[float], str] | None:
    """(mean, std) of 8-bit images as an exporter's own runtime shows them, and whose they are; None: not known."""
    if metadata.get("author") == "Ultralytics" or metadata.get("description", "").startswith("Ultralytics "):
        return [0.0] * channels, [BYTE] * channels, "of Ultralytics, whose networks take RGB in 0..1"
    if _value(metadata.get("model_type", "")) not in ("Segmentor", "Regressor"):
        return None
    mean, std = (
        _numbers(metadata[key]) if key in metadata else [usual] * channels
        for key, usual in (("standardization_mean", 0.0), ("standardization_std", 1.0))
    )
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        return None
    return [BYTE * number for number in mean], [BYTE * number for number in std], "for Deepness, which divides by 255"


def _numbers(text: str) -> list[float]:
    """The finite numbers of a list; [] where it is none."""
    value = _value(text)
    numbers = value if isinstance(value, list) else []
    return [float(n) for n in numbers] if all(type(n) in (int, float) and math.isfinite(n) for n in numbers) else []


def _value(text: str) -> object:
    """What a text of JSON or Python says; the text where it is neither."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return text


def _shown(numbers: list[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)
