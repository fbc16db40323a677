"""What PyTorch takes for the same call on the same GPU: from an image in host memory to labels in host memory."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from fcn_deploy.runtime.pixels.noise_image import natural_noise

from fcn_deploy import ModelCard

VARIANTS = ("eager", "channels-last", "compiled", "half", "half, channels-last", "half, compiled")


def variants(model: Any, card: ModelCard, device: str, names: Sequence[str] = VARIANTS) -> Iterator[tuple[str, Any]]:
    """(name, a function from an image, [H, W, C] uint8, to its labels) of each way to run a network in PyTorch."""
    import torch

    mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (card.mean, card.std))
    for name in names:
        dtype = torch.float16 if "half" in name else torch.float32
        layout = torch.channels_last if "channels-last" in name else torch.contiguous_format
        network = model.to(device=device, dtype=dtype, memory_format=layout)
        run = torch.compile(network, dynamic=True) if "compiled" in name else network

        def labels(image: np.ndarray, run: Any = run, dtype: Any = dtype, layout: Any = layout) -> np.ndarray:
            with torch.inference_mode():
                pixels = torch.from_numpy(image).to(device, non_blocking=True).permute(2, 0, 1)[None]
                normal = ((pixels.float() - mean) / std).to(dtype=dtype, memory_format=layout)
                return run(normal).argmax(1).to(torch.uint8)[0].cpu().numpy()

        yield name, labels
    model.to(device="cpu", dtype=torch.float32, memory_format=torch.contiguous_format)


def rows(
    model: Any, card: ModelCard, sizes: Sequence[tuple[int, int]], median: Callable[[Callable[[], Any]], float],
    device: str = "cuda", names: Sequence[str] = VARIANTS,
) -> list[dict[str, Any]]:  # fmt: skip
    """{"size", and milliseconds by variant, None where it fails with the reason in "errors"} of each size."""
    found: list[dict[str, Any]] = [{"size": list(size), "errors": {}} for size in sizes]
    for name, labels in variants(model, card, device, names):
        for row, size in zip(found, sizes, strict=True):
            image = natural_noise(*size, card, 0)
            row[name] = None
            try:
                row[name] = median(lambda labels=labels, image=image: labels(image))
            except Exception as error:  # no compiler, no memory: told beside the others
                row["errors"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    with suppress(ImportError, AttributeError):
        import torch

        torch.cuda.empty_cache()
    return found
