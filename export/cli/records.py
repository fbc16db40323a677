"""Records of --json: an engine's report as they have it."""

import re
from collections.abc import Mapping
from typing import Any

from fcn_deploy.runtime.latency import latency_rows

_SIZES = ("sizes", "min", "opt", "max")  # fields of a report that hold sizes


def with_sizes(value: Any, field: str = "") -> Any:
    """A report, or a part of it, with its sizes as records have them: "HxW" as [H, W], {"HxW": ms} as rows."""
    if isinstance(value, Mapping):
        if field.endswith("latency_ms"):
            return latency_rows(value)
        return {name: with_sizes(each, name) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [with_sizes(each, field) for each in value]
    if field in _SIZES and isinstance(value, str) and re.fullmatch(r"\d+x\d+", value):
        return [*map(int, value.split("x"))]
    return value
