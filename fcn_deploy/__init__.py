"""Fully convolutional networks on images whose sizes you do not control: the public names, and no others."""

from typing import TYPE_CHECKING

from fcn_deploy.runtime import DeployError, InterruptError, MisuseError, ModelCard, OverBudgetError

if TYPE_CHECKING:
    from fcn_deploy.runtime.segmenter import Segmenter
else:

    def __getattr__(name: str) -> object:
        """Segmenter, loaded when it is asked for: it brings NumPy, which `--help` does without."""
        if name != "Segmenter":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from fcn_deploy.runtime.segmenter import Segmenter

        return Segmenter


__all__ = ["DeployError", "InterruptError", "MisuseError", "ModelCard", "OverBudgetError", "Segmenter"]
