"""Checkpoints: safetensors with the model card and the architecture as metadata."""

import json
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fcn_deploy.calibration.datasets import VOC_CLASSES
from fcn_deploy.fcn.architecture import TORCHVISION, AnySize, Architecture
from fcn_deploy.fcn.backbones import load_matching
from fcn_deploy.fcn.model import build_network
from fcn_deploy.runtime.engine_format.model_card import CARD_KEY, ModelCard
from fcn_deploy.runtime.errors import DeployError, MisuseError, one_line
from fcn_deploy.runtime.files import replacing

ARCHITECTURE_KEY = "fcn_deploy.architecture"
TRAINING_KEY = "fcn_deploy.training"
VERSION = 1


@dataclass
class Checkpoint:
    """A network with what is needed to use it.

    Attributes:
        model: in evaluation mode.
        card: of the model.
        training: what is known of its training (data, epochs, validation mIoU, …), for people.
    """

    model: AnySize
    card: ModelCard
    training: dict[str, Any] = field(default_factory=dict)


def card_for(
    architecture: Architecture, classes: tuple[str, ...], colors: tuple[tuple[int, int, int], ...] = ()
) -> ModelCard:
    """The card of a network: its backbone's normalisation, its stride and size multiple."""
    model = build_network(Architecture(**{**architecture.to_dict(), "width": 0.01}))
    mean, std = model.backbone.mean, model.backbone.std
    if architecture.channels != 3:
        # Published statistics are RGB's; other bands are centred on the middle of 8 bits.
        mean, std = (127.5,) * architecture.channels, (127.5,) * architecture.channels
    return ModelCard(
        classes=classes,
        colors=colors,
        channels=architecture.channels,
        mean=mean,
        std=std,
        stride=model.stride,
        size_multiple=model.size_multiple,
    )


def save_checkpoint(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically. Raises DeployError where it cannot be written."""
    from safetensors.torch import save

    # Shared or strided tensors are not storable as they are.
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.model.state_dict().items()}
    metadata = {
        CARD_KEY: checkpoint.card.to_json(),
        ARCHITECTURE_KEY: json.dumps({"version": VERSION} | checkpoint.model.architecture.to_dict()),
        TRAINING_KEY: json.dumps(checkpoint.training),
    }
    with replacing(path) as temporary:
        temporary.write_bytes(save(state, metadata))


def load_checkpoint(path: str | os.PathLike[str], note: Callable[[str], None] = lambda line: None) -> Checkpoint:
    """Read a checkpoint of ours (.safetensors), or the state dict of one of torchvision's segmentation networks.

    Args:
        path: .safetensors, or a file of torch.save.
        note: called with what was assumed, a line each.

    Raises:
        MisuseError: no such file, or of another kind.
        DeployError: damaged, of another version, or of another architecture.
    """
    path = Path(path)
    if not path.is_file():
        raise MisuseError(f"{path} does not exist or is not a file; name a .safetensors checkpoint")
    if path.suffix != ".safetensors":
        return from_torchvision(load_state(path, note), str(path), note)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise DeployError(f"{path} is not a safetensors file, or it is damaged: {one_line(error)}") from error
    if CARD_KEY not in metadata or ARCHITECTURE_KEY not in metadata:
        return from_torchvision(state, str(path), note)
    card = ModelCard.from_json(metadata[CARD_KEY], str(path))
    try:
        data = json.loads(metadata[ARCHITECTURE_KEY])
        if data.pop("version") != VERSION:
            raise DeployError(f"{path} is a checkpoint of another version; upgrade fcn-deploy or train again")
        architecture = Architecture(**data)
        training = dict(json.loads(metadata.get(TRAINING_KEY, "{}")))
    except (ValueError, TypeError, KeyError, MisuseError) as error:
        raise DeployError(f"{path} describes no network that can be built; is it damaged? ({error})") from error
    if architecture.classes != card.scores or architecture.channels != card.channels:
        raise DeployError(f"{path}: its architecture and its model card disagree on classes or channels")
    model = build_network(architecture)
    try:
        load_matching(model, state, ignored=())
    except DeployError as error:
        raise DeployError(f"{path} does not hold the {_describe(architecture)} it says: {error}") from error
    return Checkpoint(model.eval(), card, training)


def _describe(architecture: Architecture) -> str:
    kind = f"FCN-{architecture.stride}s" if architecture.arch == "fcn" else architecture.arch
    return f"{kind} {architecture.backbone}"


COUNTER = "num_batches_tracked"  # of batch norms; old state dicts lack it, and nothing reads it
CONTAINERS = (
    "state_dict", "model_state_dict", "model", "ema", "ema_state_dict", "model_ema", "state_dict_ema", "params_ema",
    "params", "net", "network",
)  # fmt: skip  # where training scripts keep a state dict beside an optimiser's


def load_state(
    path: str | os.PathLike[str], note: Callable[[str], None] = lambda line: None
) -> dict[str, torch.Tensor]:
    """A state dict: .safetensors, or of torch.save, without running code from the file.

    Where the file holds it beside other things, as training scripts save it, it is taken out, and `note` told so.
    Raises MisuseError or DeployError.
    """
    path = Path(path)
    if not path.is_file():
        raise MisuseError(f"{path} does not exist or is not a file; name a file of weights")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise DeployError(f"cannot read weights from {path}: {one_line(error)}") from error
    try:
        state = _loaded(path, note)
    except Exception as error:  # pickle, zip and torch errors alike
        reason = str(error).split(".")[0].splitlines()[0] if str(error) else type(error).__name__
        raise DeployError(f"cannot read weights from {path}: {reason}; save a state dict with torch.save") from error
    while (found := _contained(state) or _only_state_dict(state, path)) is not None:
        others = [key for key in CONTAINERS if key != found and _contained(state, (key,))]
        left = f", and {', '.join(others)} left out" if others else ""
        note(f"{path}: the weights under {found!r} are taken{left}")
        state = state[found]
    held = [state, *(state.get(key) for key in CONTAINERS)] if isinstance(state, Mapping) else []
    if any(isinstance(value, _Unread) for value in held):
        raise DeployError(f"{path} holds a pickled object, whose code is not run; save model.state_dict()")
    if not _is_state_dict(state):
        raise DeployError(f"{path} holds no state dict (names → tensors); save model.state_dict()")
    if not state:
        raise DeployError(f"{path} holds no weights; save model.state_dict()")
    return dict(state)


def _loaded(path: Path, note: Callable[[str], None]) -> Any:
    """What torch.save wrote. Objects of classes that are no part of a state dict, such as a training script's options
    or paths, are read as empty ones: their code is neither imported nor run.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if not names:
            raise
    with torch.serialization.safe_globals([(type(name, (_Unread,), {}), name) for name in names]):
        state = torch.load(path, map_location="cpu", weights_only=True)
    note(f"{path}: objects of {', '.join(sorted(names)[:3])}{', …' if len(names) > 3 else ''} in it are not read")
    return state


class _Unread(dict):
    """An object in a checkpoint that is not read: it takes whatever its own class would, and keeps nothing."""

    def __init__(self, *values: Any, **fields: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """As a list's."""

    def extend(self, values: Any) -> None:
        """As a list's."""


def _contained(state: Any, keys: Sequence[str] = CONTAINERS) -> str | None:
    """The first of these keys under which there is something like a state dict."""
    if not isinstance(state, Mapping):
        return None
    return next((key for key in keys if isinstance(state.get(key), Mapping) and state[key]), None)


def _only_state_dict(state: Any, path: Path) -> str | None:
    """The one key under which there is a state dict, whatever it is called. Raises DeployError where there are more."""
    if not isinstance(state, Mapping) or _is_state_dict(state):
        return None
    found = [
        key
        for key, value in state.items()
        if isinstance(key, str)
        and isinstance(value, Mapping)
        and value
        and (_is_state_dict(value) or _contained(value))
    ]
    if len(found) > 1:
        raise DeployError(f"{path} holds several state dicts ({', '.join(found[:4])}); save the one that is wanted")
    return found[0] if found else None


def _is_state_dict(state: Any) -> bool:
    return isinstance(state, Mapping) and all(isinstance(value, torch.Tensor) for value in state.values())


def from_torchvision(
    state: Mapping[str, torch.Tensor], source: str, note: Callable[[str], None] = lambda line: None
) -> Checkpoint:
    """One of torchvision's segmentation networks from its state dict; the auxiliary head is left out.

    fcn_resnet50 and 101, deeplabv3_resnet50, 101 and _mobilenet_v3_large, and lraspp_mobilenet_v3_large are known by
    the names of their parameters. 21 classes are taken for Pascal VOC's, as in torchvision's weights.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    given = {name for name in state if not name.startswith("aux_classifier.") and not name.endswith(COUNTER)}
    nearest, share, apart = ("", "", 0), 0.0, set()
    for (arch, backbone), stride in TORCHVISION.items():
        with torch.device("meta"):
            own = build_network(Architecture(1, arch, backbone, stride, width=0.01)).state_dict()
        known = {name for name in own if not name.endswith(COUNTER)}
        if (found := len(known & given) / len(known | given)) > share:
            nearest, share, apart = (arch, backbone, stride), found, known ^ given
    if share < 1:
        few = f"{', '.join(sorted(apart)[:3])}{', …' if len(apart) > 3 else ''}"
        like = f"the nearest is {_torchvision_name(*nearest[:2])}, but for {len(apart)} names, {few}; " if share else ""
        raise DeployError(
            f"{source} is no checkpoint of train-fcn and no state dict of torchvision's ({like}fcn, deeplabv3 and "
            f"lraspp are known); name the module it belongs to: export-onnx package.module:factory --weights {source}"
        )
    arch, backbone, stride = nearest
    last = {"dilated8": "classifier.4", "deeplabv3": "classifier.4", "lraspp": "classifier.high_classifier"}[arch]
    # A narrow network's width is told by its first layer.
    first, usual = ("backbone.0.0.weight", 16) if backbone == "mobilenet-v3-large" else ("backbone.conv1.weight", 64)
    count = len(state[f"{last}.weight"])
    width, channels = state[first].shape[0] / usual, state[first].shape[1]
    model = build_network(Architecture(count, arch, backbone, stride, width=width, channels=channels))
    try:
        load_matching(model, state, ignored=("aux_classifier.",))
    except DeployError as error:
        raise DeployError(f"{source} is not torchvision's {_torchvision_name(arch, backbone)}: {error}") from error
    note(f"{source} is torchvision's {_torchvision_name(arch, backbone)}{PADDED if model.size_multiple > 1 else ''}")
    names = tuple(VOC_CLASSES) if count == len(VOC_CLASSES) else tuple(f"class {i}" for i in range(count))
    return Checkpoint(model.eval(), card_for(model.architecture, names))


PADDED = "; its scores are torchvision's at multiples of 8, and other sizes are padded to them"


def _torchvision_name(arch: str, backbone: str) -> str:
    return f"{'fcn' if arch == 'dilated8' else arch}_{backbone.replace('-', '_')}"
