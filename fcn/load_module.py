"""PyTorch modules from elsewhere, found and given their weights."""

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fcn_deploy.fcn.checkpoint import load_checkpoint, load_state
from fcn_deploy.fcn.foreign import Note, unwrapped
from fcn_deploy.fcn.programs import as_module, load_program, saved_form
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.errors import DeployError, MisuseError, one_line
from torch import nn

SHOWN = 4  # names in an error
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # PyTorch's, in names of wrapped parts


def load_module(source: str, weights: Path | None, note: Note) -> tuple[nn.Module, ModelCard | None]:
    """A path or `package.module:factory` as (module, card if it has one).

    A path is that of a checkpoint, or of what torch.export.save (.pt2) or torch.jit.save wrote.

    Args:
        weights: a state dict for the factory's module, .safetensors or of torch.save; loaded strictly.
        note: called with what was assumed, a line each.

    Raises:
        MisuseError: no such file, module or factory.
        DeployError: the factory fails, gives no torch.nn.Module, or the weights are not its own.
    """
    module_name, colon, factory_name = source.partition(":")
    if not colon or Path(source).exists():
        if weights is not None:
            raise MisuseError(f"{source} has its weights; --weights is for package.module:factory")
        if form := saved_form(Path(source)):
            return load_program(Path(source), form), None
        checkpoint = load_checkpoint(source, note)
        return checkpoint.model, checkpoint.card
    sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except ModuleNotFoundError as error:
        raise MisuseError(f"{source}: {error}; name it as package.module:factory, importable from here") from error
    except AttributeError as error:
        raise MisuseError(f"{source}: {module_name} has no {factory_name}") from error
    except Exception as error:
        raise DeployError(f"{source}: importing {module_name} failed: {one_line(error, 300)}") from error
    finally:
        sys.path.pop(0)
    try:
        module = as_module(factory)
        module = module if isinstance(module, nn.Module) else as_module(factory())
    except Exception as error:
        raise DeployError(f"{source}: the factory failed: {type(error).__name__}: {one_line(error, 300)}") from error
    if not isinstance(module, nn.Module):
        raise DeployError(f"{source} gives {type(module).__name__}; a factory returns a torch.nn.Module")
    if weights is not None:
        load_strictly(unwrapped(module), load_state(weights, note), str(weights), source, note)
    card = getattr(module, "card", None)
    return module, card if isinstance(card, ModelCard) else None


def load_strictly(
    module: nn.Module, state: Mapping[str, torch.Tensor], file: str, name: str, note: Note = lambda line: None
) -> None:
    """Load every parameter and buffer of a module from a state dict that has them and no others.

    A prefix that all of them have in the state dict, or all in the module, is dropped and said aloud, and so is what
    the state dict has outside the prefix (a loss's weights, say).

    Raises:
        DeployError: names are missing, unexpected, or of another shape: the first few.
    """
    full = {_without_wrappers(key): key for key in module.state_dict()}
    own = {_without_wrappers(key): value for key, value in module.state_dict().items()}
    state = {_without_wrappers(key): value for key, value in state.items()}
    prefix, wrapper = _prefixes(own, state)
    if prefix:
        others = [key for key in state if not key.startswith(prefix)]
        left = f"; {len(others)} names without it are left out ({_few(others)})" if others else ""
        note(f"{file}: the prefix {prefix!r} of its names is dropped{left}")
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if wrapper:
        note(f"{file}: its names lack the prefix {wrapper!r} of those of {name}, which is added")
        state = {wrapper + key: value for key, value in state.items()}
    # Counters of batch norms, which old files lack; they have no use after training.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} of {list(state[key].shape)} instead of {list(value.shape)}"
        for key, value in own.items()
        if key in state and isinstance(value, torch.Tensor) and state[key].shape != value.shape
    ]
    wrong = [
        f"{len(found)} {what} ({_few(found)})"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if found
    ]
    if wrong:
        matching = sum(key in own for key in state) - len(shapes)
        raise DeployError(
            f"{file} does not fit {name}: of its {len(state)} names {matching} match; {', '.join(wrong)}; "
            "build the module as it was trained, or change the file's names"
        )
    try:
        module.load_state_dict({full[key]: state.get(key, value) for key, value in own.items()})
    except Exception as error:
        raise DeployError(f"{file} cannot be loaded into {name}: {one_line(error, 300)}") from error


def _without_wrappers(name: str) -> str:
    """A name without what torch.compile and the like put between those of a part and of what is in it."""
    first, *parts = name.split(".")
    return ".".join([first, *(part for part in parts if part not in WRAPPERS)])


def _prefixes(own: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[str, str]:
    """What the state dict's names have before the module's own, and the other way round; "" where they agree.

    Of several, such as those of a network and of its running mean, that of the most names, the first of equal ones.
    """
    if not own or not state or any(key in state for key in own):
        return "", ""
    if (prefix := _most_common_prefix(state, own)) is not None:
        return prefix, ""
    return "", _most_common_prefix(own, state) or ""


def _most_common_prefix(longer: Mapping[str, Any], names: Mapping[str, Any]) -> str | None:
    for name in names:
        if found := dict.fromkeys(key.removesuffix(name) for key in longer if key.endswith(f".{name}")):
            return max(found, key=lambda prefix: sum(prefix + each in longer for each in names))
    return None


def _few(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
