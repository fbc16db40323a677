"""The thin runtime: a label for every pixel of an image of any size.

It needs NumPy, Pillow, tifffile, Typer and Rich, and one backend; never torch, onnx or the other floors.
"""

import os
from typing import TYPE_CHECKING

from .engine_format.model_card import ModelCard
from .errors import DeployError, InterruptError, MisuseError, OverBudgetError

# ONNX Runtime 1.32 keeps an identifier of the machine in the user's home, and what it would report, unless it is told.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from .segmenter import Segmenter
else:

    def __getattr__(name: str) -> object:
        """Segmenter, loaded when it is asked for: it brings NumPy, which `--help` does without."""
        if name != "Segmenter":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from .segmenter import Segmenter

        return Segmenter


__all__ = ["DeployError", "InterruptError", "MisuseError", "ModelCard", "OverBudgetError", "Segmenter"]
