"""Networks that put values where maxima were found: of two that are nearly equal, float32's rounding picks the place.

ENet and SegNet unpool like this. Another place moves scores by several per cent of their range in a receptive field,
in PyTorch as well when its image changes by as little as rounding does; so either score is the network's.
"""

from collections.abc import Iterator

import numpy as np
from onnx import ModelProto

ROUNDED = "of two that are nearly equal rounding picks one, in PyTorch too, and scores near it may be those of either"
TIMES = 16  # enough that each of two places is seen, but for one tie in 65,536
ROUNDING = 4 * float(np.finfo(np.float32).eps)  # of a value: what sums in another order differ by


def picks_places(model: ModelProto) -> bool:
    """Whether places of maxima matter to a graph."""
    return any(
        node.op_type in ("ArgMax", "ArgMin", "TopK") or (node.op_type == "MaxPool" and any(node.output[1:]))
        for node in model.graph.node
    )


def rounded_otherwise(images: np.ndarray) -> Iterator[np.ndarray]:
    """The same images, to float32's rounding, TIMES times."""
    random = np.random.default_rng(0)
    for _ in range(TIMES):
        noise = random.standard_normal(images.shape, dtype=np.float32)
        yield (images * (1 + ROUNDING * noise)).astype(np.float32)
