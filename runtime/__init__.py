"""The thin runtime: a label for every pixel of an image of any size.

It needs NumPy, Pillow, tifffile, Typer and Rich, and one backend; never torch, onnx or the other floors.
"""

from .errors import DeployError, InterruptError, MisuseError, OverBudgetError
from .model_card import ModelCard
from .segmenter import Segmenter

__all__ = ["DeployError", "InterruptError", "MisuseError", "ModelCard", "OverBudgetError", "Segmenter"]
