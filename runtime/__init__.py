"""The thin runtime: a label for every pixel of an image of any size. NumPy and one backend, nothing else."""

from runtime.engine_file import ModelCard
from runtime.errors import DeployError, MisuseError
from runtime.segmenter import Segmenter

__all__ = ["DeployError", "MisuseError", "ModelCard", "Segmenter"]
