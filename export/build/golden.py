"""The golden sample: a small image and its scores, by which verify-engine judges hardware the builder never saw."""

import io
from collections.abc import Sequence

import numpy as np
from fcn_deploy.export.tolerances import GOLDEN_SAMPLE
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.errors import DeployError
from fcn_deploy.runtime.manifest import GpuPlan
from fcn_deploy.runtime.model_card import ModelCard
from fcn_deploy.runtime.noise_image import natural_noise
from fcn_deploy.runtime.prepare import Border, padded_size, prepare
from fcn_deploy.runtime.sizes import Size
from onnx import ModelProto

GOLDEN_SIZE = (61, 83)


def golden_sample(
    networks: Sequence[ModelProto],
    card: ModelCard,
    precision: str,
    gpu: GpuPlan | None = None,
    border: Border | None = None,
    size: Size = GOLDEN_SIZE,
) -> bytes:
    """A small image and its scores, float32, by the core run as written: the content of the member.

    Where no profile of `gpu` holds its size, it is of the smallest size that one does.

    Args:
        networks: the core, or its stages.
        card: of the model.
        precision: of the engine.
        gpu: its plan.
        border: of its first stage.
        size: height and width of the image.

    Raises:
        DeployError: the network does not run.
    """
    height, width = size
    if gpu is not None and not any(p.holds(padded_size(height, width, card)) for p in gpu.profiles):
        least = min((profile.min for profile in gpu.profiles), key=lambda size: size[0] * size[1])
        height, width = (side - min(3, card.size_multiple - 1) for side in least)  # so that something is padded
    image = natural_noise(height, width, card, seed=0)
    scores = prepare(image, card, border=border)
    try:
        for network in networks:
            run = session(network.SerializeToString(), optimise=False)
            scores = run.run(None, {run.get_inputs()[0].name: scores})[0]
    except Exception as error:
        raise DeployError(f"the network does not run on an image of {height}×{width} pixels: {error}") from error
    buffer = io.BytesIO()
    np.savez(buffer, image=image, scores=scores[0].astype(np.float32), tolerance=GOLDEN_SAMPLE[precision])
    return buffer.getvalue()
