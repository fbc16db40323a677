"""The golden sample: a small image and its scores, by which verify-engine judges hardware the builder never saw."""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from fcn_deploy.export.tolerances import GOLDEN_SAMPLE
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.engine_format.manifest import GpuPlan, Profile
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.errors import DeployError
from fcn_deploy.runtime.golden_sample import repeated
from fcn_deploy.runtime.pixels.noise_image import natural_noise
from fcn_deploy.runtime.pixels.prepare import Border, padded_size, prepare
from fcn_deploy.runtime.sizes import Size
from onnx import ModelProto

GOLDEN_SIZE = (61, 83)
LARGEST_CHECKED = 1 << 20  # pixels of the sizes that a plan's profiles are checked at
LARGEST_ODD = LARGEST_CHECKED // 4  # of the odd ones of them
KEPT_SCORES = 20_000  # of each of these sizes, about


def golden_sample(
    networks: Sequence[ModelProto],
    card: ModelCard,
    precision: str,
    gpu: GpuPlan | None = None,
    border: Border | None = None,
    size: Size = GOLDEN_SIZE,
) -> bytes:
    """A small image and its scores, float32, by the core run as written: the content of the member.

    Where no profile of `gpu` holds its size, it is of the smallest size that one does. Of a plan also the scores at
    MIN, OPT, MAX and an odd size of each profile: libraries have been wrong at some shapes and right at others, and
    where maps are resized by no whole factor they may read other cells.

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
    sessions = [session(network.SerializeToString(), optimise=False) for network in networks]

    def scores_of(image: np.ndarray) -> np.ndarray:
        scores = prepare(image, card, border=border)
        try:
            for run in sessions:
                scores = run.run(None, {run.get_inputs()[0].name: scores})[0]
        except Exception as error:
            side = "×".join(map(str, image.shape[:2]))
            raise DeployError(f"the network does not run on an image of {side} pixels: {error}") from error
        return scores[0].astype(np.float32)

    entries: dict[str, Any] = {"image": image, "scores": scores_of(image), "tolerance": GOLDEN_SAMPLE[precision]}
    if gpu is not None and (sizes := _ends(gpu, (height, width))):
        found = [scores_of(repeated(image, size)) for size in sizes]
        steps = [max(1, math.ceil(math.sqrt(scores.size / KEPT_SCORES))) for scores in found]
        entries |= {"sizes": np.array(sizes), "steps": np.array(steps)}
        parts = zip(found, steps, strict=True)
        entries |= {f"scores_{index}": scores[:, ::step, ::step] for index, (scores, step) in enumerate(parts)}
    buffer = io.BytesIO()
    np.savez(buffer, **entries)
    return buffer.getvalue()


def _ends(gpu: GpuPlan, but: Size) -> list[Size]:
    """MIN, OPT, MAX and an odd size of each profile, in order; of those that are too large, the largest that is not."""
    found: dict[Size, None] = {}
    for profile in gpu.profiles:
        ends = [_within(size, LARGEST_CHECKED, profile) for size in (profile.min, profile.opt, profile.max)]
        # Of another shape than the ends, so that rows and columns are resized otherwise.
        sides = zip(profile.min, profile.max, (0.38, 0.62), strict=True)
        between = _within(tuple(low + int(share * (high - low)) for low, high, share in sides), LARGEST_ODD, profile)
        odd = between and tuple(
            max(least, side - 1 + side % 2) for least, side in zip(profile.min, between, strict=True)
        )
        found |= dict.fromkeys(size for size in (*ends, odd) if size is not None)
    return [size for size in found if size != but]


def _within(size: Size, pixels: int, profile: Profile) -> Size | None:
    """A size, made as small as `pixels` and the profile want it; None where its MIN is larger."""
    share = min(1.0, math.sqrt(pixels / (size[0] * size[1])))
    height, width = (max(least, int(side * share)) for least, side in zip(profile.min, size, strict=True))
    return (height, width) if height * width <= pixels else None
