"""The thin runtime: a label for every pixel of an image of any size. NumPy and one backend, nothing else."""

from .errors import DeployError, InterruptError, MisuseError, OverBudgetError
from .model_card import ModelCard
from .segmenter import Segmenter

__all__ = ["DeployError", "InterruptError", "MisuseError", "ModelCard", "OverBudgetError", "Segmenter"]
