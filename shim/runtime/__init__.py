"""`from runtime import Segmenter`, for programs written before the package was called fcn_deploy."""

from fcn_deploy import DeployError, InterruptError, MisuseError, ModelCard, OverBudgetError, Segmenter

__all__ = ["DeployError", "InterruptError", "MisuseError", "ModelCard", "OverBudgetError", "Segmenter"]
