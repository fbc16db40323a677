"""Fully convolutional networks on images whose sizes you do not control: the public names, and no others."""

from fcn_deploy.runtime import DeployError, InterruptError, MisuseError, ModelCard, OverBudgetError, Segmenter

__all__ = ["DeployError", "InterruptError", "MisuseError", "ModelCard", "OverBudgetError", "Segmenter"]
