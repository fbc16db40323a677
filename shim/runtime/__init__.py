"""`from runtime import Segmenter`, for programs written before the package was called fcn_deploy."""

import fcn_deploy
from fcn_deploy import __all__ as __all__


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(fcn_deploy, name)
