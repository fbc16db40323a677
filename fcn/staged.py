"""A network of ours run by PyTorch as engines are: in stages, the first in tiles, with exact upsampling behind them.

Whole scenes are validated so: full-size scores and large maps would take gigabytes, and most of the time.
"""

import copy
import io
import logging
import math
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import torch
from fcn_deploy.fcn.architecture import AnySize, Architecture
from fcn_deploy.fcn.backbones import EARLY
from fcn_deploy.runtime.arrays import AnyArray
from fcn_deploy.runtime.backends import Session
from fcn_deploy.runtime.backends.host import HostBackend
from fcn_deploy.runtime.engine_format.manifest import Stage, Upsampling
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.network import Network
from torch import nn

TILE = 512  # pixels of a side, without halo: maps at stride 2 stay near the caches, and memory is reused
OPENVINO_TILE = 1536  # of OpenVINO, which minds its caches itself: fewer halos, and fewer shapes of tiles
BYTES_PER_PIXEL = 600  # of the local part: its largest maps and what PyTorch keeps beside them
LATE_BYTES_PER_PIXEL = 120
MOST_REACH = 1024  # pixels that a part may see beyond a tile; one that sees more is run whole
LEAST = 64  # pixels: of half of what is traced
Part = Callable[[torch.Tensor], torch.Tensor]
_found_halos: dict[tuple[Architecture, int], list[int | None]] = {}


class Opens(Protocol):
    """What opens an ONNX as a session of a library."""

    def __call__(self, model: bytes, *, threads: int | None) -> Session: ...


class TorchSession:
    """One part of a network, on arrays; on the device of its parameters."""

    name, streams = "PyTorch", 1

    def __init__(self, part: Part, device: torch.device) -> None:
        self._part, self._device = part, device

    def run(self, image: AnyArray) -> AnyArray:
        """As `Session` says."""
        with torch.inference_mode():
            x = torch.from_numpy(image).to(self._device).contiguous(memory_format=torch.channels_last)
            found: AnyArray = self._part(x).cpu().contiguous().numpy()
        return found

    def release(self, image: AnyArray) -> AnyArray:
        """As `Session` says: PyTorch keeps nothing on the CPU."""
        return self.run(image)

    def close(self) -> None:
        """As `Session` says."""


def staged_network(model: AnySize, card: ModelCard, exported: bool = False, opens: Opens | None = None) -> Network:
    """A network in eval mode as a Network of the runtime.

    Args:
        model: whose weights PyTorch's network goes on sharing.
        card: of it.
        exported: run it by OpenVINO or ONNX Runtime, where one is installed and the network is on the CPU and no other
            than its weights say (as while it is rounded for INT8): its weights as they are now, several times as fast.
        opens: the library; None: the fastest that is installed.
    """
    device = next(model.parameters()).device
    parts = model.parts()
    library = (opens or _fastest()) if exported and device.type == "cpu" and _exportable(model) else None
    sessions: list[Session] = (
        [TorchSession(part, device) for part, _ in parts]
        if library is None
        else _exported(model, card.channels, library)
    )
    tile = OPENVINO_TILE if sessions[0].name == "openvino" else TILE
    stages, halos = [], _halos(model, card.channels)
    for index, (_, stride) in enumerate(parts):
        local = index < len(parts) - 1
        halo = halos[index]
        stages.append(
            Stage(
                file=f"part {index}",
                halo=None if halo is None else (halo, halo),
                period=stride,
                whole="" if halo is not None else "its last part looks at the whole image",
                stride=(stride, stride),
                bytes_per_pixel=BYTES_PER_PIXEL if local else LATE_BYTES_PER_PIXEL,
                output_bytes=4 * 64 / stride**2,
                tile=tile if local else None,
            )
        )
    # Networks that take every size upsample to it; the others by their stride.
    factor = None if model.size_multiple == 1 else (float(model.stride), float(model.stride))
    upsampling = Upsampling("linear", "half_pixel", factor, fades=model.architecture.upsampling == "learned")
    return Network.of(HostBackend(sessions, card, upsampling), card, upsampling, stages)


class TorchPredictor:
    """The labels of a network in eval mode, one image at a time; those of its own logits, but for rounding.

    Arguments are those of `staged_network`.
    """

    def __init__(self, model: AnySize, card: ModelCard, exported: bool = False) -> None:
        self._net, self._unit = staged_network(model, card, exported), _unit(model)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        labels: np.ndarray = self._net.result(image, "labels")
        return labels

    def where(self, wanted: np.ndarray, image: np.ndarray) -> np.ndarray:
        """The labels of an image where they are `wanted`, bool [H, W]; 0 beyond a rectangle round these.

        The network is run on what their scores depend on: the margins of a scene, or all but a corner that has labels,
        cost nothing.
        """
        halos = [stage.halo for stage in self._net.stages]
        if None in halos:
            return self(image)
        labels = np.zeros(image.shape[:2], self._net.card.label_dtype)
        if wanted.any():
            # What lies between scores is interpolated from the cells beside it, too.
            reach = sum(max(halo) for halo in halos if halo is not None) + self._unit
            rows, columns = (self._reached(np.asarray(wanted.any(axis=axis)), reach) for axis in (1, 0))
            labels[rows, columns] = self(image[rows, columns])
        return labels

    def _reached(self, wanted: np.ndarray, reach: int) -> slice:
        """Along an axis: from a block of pixels of which the network takes whole ones to the end of such."""
        first, last = np.flatnonzero(wanted)[[0, -1]]
        start, stop = (first - reach) // self._unit * self._unit, -(-(last + 1 + reach) // self._unit) * self._unit
        return slice(max(int(start), 0), min(int(stop), len(wanted)))


def _exportable(model: AnySize) -> bool:
    rounded = any("_conv_forward" in vars(module) for module in model.modules())
    return not rounded and find_spec("onnx") is not None


class _Part(nn.Module):
    """One of a network's parts, for the exporter."""

    def __init__(self, model: AnySize, index: int) -> None:
        super().__init__()
        self.model, self.index = model, index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.parts()[self.index][0](x)


def _exported(model: AnySize, channels: int, opens: Opens) -> list[Session]:
    """The parts in another library, with the weights of now. By PyTorch's older exporter, which takes a second."""
    sessions: list[Session] = []
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        x = torch.zeros(1, channels, 2 * LEAST, 3 * LEAST)
        for index in range(len(model.parts())):
            part, data = _Part(model, index).eval(), io.BytesIO()
            into: Any = data  # its types know of paths alone
            with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")  # of its age
                sides = {0: "N", 2: "H", 3: "W"}
                torch.onnx.export(
                    part, (x,), into, dynamo=False, opset_version=18, input_names=["image"], output_names=["scores"],
                    dynamic_axes={"image": sides, "scores": {0: "N", 2: "h", 3: "w"}},
                )  # fmt: skip
            sessions.append(opens(data.getvalue(), threads=torch.get_num_threads()))
            with torch.no_grad():
                x = part(x)
    finally:
        logging.disable(level)
    return sessions


def _fastest() -> Opens | None:
    """OpenVINO: large maps of few channels take it half of ONNX Runtime's time, others as long. None: neither is there.

    Measured with EfficientNet-Lite0 on a CPU with AVX-512.
    """
    if find_spec("openvino") is not None:
        from fcn_deploy.runtime.backends.openvino import OpenVinoSession

        return OpenVinoSession
    if find_spec("onnxruntime") is not None:
        from fcn_deploy.runtime.backends.onnxruntime import OnnxRuntimeSession

        return OnnxRuntimeSession
    return None


def _halos(model: AnySize, channels: int) -> list[int | None]:
    """How far each part sees beyond a block of pixels that the network takes, rounded up to such; None: everything.

    It hangs on the architecture alone, and is looked for once: validation asks at each epoch, for half a second.
    """
    known = model.architecture, channels
    if known not in _found_halos:
        _found_halos[known] = _halos_by_ones(model, channels)
    return _found_halos[known]


def _halos_by_ones(model: AnySize, channels: int) -> list[int | None]:
    """As `_halos`.

    A copy whose weights are all positive, without biases, shows a block of ones among zeros in every cell that depends
    on it, whatever lies between.
    """
    positive = copy.deepcopy(model).cpu().eval()
    for module in positive.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / math.prod(module.weight.shape[1:]))
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            nn.init.ones_(module.weight)
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                nn.init.zeros_(parameter)
    # What is pooled over the whole image may only multiply the rest, and zeros would hide it.
    pooled = model.size_multiple == 1 or any(isinstance(module, nn.AdaptiveAvgPool2d) for module in model.modules())
    halos: list[int | None] = []
    takes, before = channels, 1  # channels, and pixels of a cell, of what a part is given
    parts = positive.parts()
    for index, (part, stride) in enumerate(parts):
        if pooled and index == len(parts) - 1:
            return [*halos, None]
        halos.append(_reach(part, takes, before, max(_unit(model), stride)))
        with torch.inference_mode():
            side = max(_unit(model), stride) // before
            takes, before = part(torch.zeros(1, takes, side, side)).shape[1], stride
    return halos


def _unit(model: AnySize) -> int:
    """Pixels at whose multiples tiles begin."""
    return max(model.size_multiple, EARLY)


def _reach(part: Part, channels: int, cell: int, unit: int) -> int | None:
    """Pixels that a part of positive weights sees beyond a block of `unit`, its cells of `cell` pixels, as multiples of
    `unit`; None: more than MOST_REACH.
    """
    blocks = 8
    while blocks * unit <= 2 * MOST_REACH:
        side, middle = blocks * unit // cell, slice(blocks // 2 * unit // cell, (blocks // 2 + 1) * unit // cell)
        given = torch.zeros(1, channels, side, side)
        given[:, :, middle, middle] = 1
        with torch.inference_mode():
            touched = (part(given)[0] != 0).any(0).numpy()
        seen = np.flatnonzero(touched.any(0) | touched.any(1))
        across = touched.shape[0] / blocks  # cells of a block
        first, last = math.floor(seen[0] / across), math.ceil((seen[-1] + 1) / across)
        if first > 0 and last < blocks:
            return max(blocks // 2 - first, last - blocks // 2 - 1) * unit
        blocks *= 2
    return None
