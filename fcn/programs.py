"""PyTorch's forms of a network beside a plain module: TorchScript, exported programs, compiled and quantised ones."""

import copy
import sys
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import torch
from fcn_deploy.runtime.errors import DeployError, one_line
from torch import nn

PROGRAM, SCRIPT = "an exported program", "TorchScript"
# In the names of PyTorch's quantised layers, and of those that watch ranges whenever they run.
QUANTISED = (".quantized.", ".quantized", "FusedMovingAvgObsFakeQuantize")


def saved_form(path: Path) -> str:
    """PROGRAM or SCRIPT, where a file holds a network with its code as torch saves it; "": weights, or something else.

    A zip as both are, whose entries lie in one folder: `code/` is TorchScript's, `models/` and an `archive_format`
    those of torch.export.save.
    """
    if not zipfile.is_zipfile(path):
        return ""
    with zipfile.ZipFile(path) as archive:
        names = {name.split("/", 1)[-1] for name in archive.namelist()}
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return PROGRAM
    return SCRIPT if any(name.startswith("code/") for name in names) and "constants.pkl" in names else ""


def load_program(path: Path, form: str) -> nn.Module:
    """The module in a file of torch.export.save or torch.jit.save. Raises DeployError."""
    try:
        return torch.export.load(path).module() if form == PROGRAM else torch.jit.load(path, map_location="cpu")
    except Exception as error:  # of zip, JSON and torch alike
        raise DeployError(f"{path} cannot be read as {form}: {one_line(error, 200)}") from error


def as_module(made: object) -> object:
    """The module of an exported program; anything else as it is."""
    return made.module() if isinstance(made, torch.export.ExportedProgram) else made


def is_script(model: nn.Module) -> bool:
    """Whether a module, or a part of it, is TorchScript, traced or scripted."""
    return any(isinstance(part, torch.jit.ScriptModule) for part in nn.Module.modules(model))


def is_program(model: nn.Module) -> bool:
    """Whether a module, or a part of it, is that of an exported program, which is in the mode it was exported in."""
    return any(isinstance(part, torch.fx.GraphModule) and "train" in vars(part) for part in nn.Module.modules(model))


def set_evaluation(model: nn.Module) -> nn.Module:
    """The module in evaluation mode; an exported program as it was exported."""
    with suppress(NotImplementedError):
        model.eval()
    return model


def refuse_quantised(model: nn.Module, name: str) -> None:
    """Raise DeployError where a module has layers that PyTorch has quantised: no exporter of its own takes them."""
    for part in nn.Module.modules(model):
        where = f"{type(part).__module__}.{getattr(part, 'original_name', type(part).__name__)}"
        if any(word in where for word in QUANTISED) or (
            isinstance(part, torch.fx.GraphModule)
            and any("quantize_per" in str(node.target) for node in part.graph.nodes if node.op == "call_function")
        ):
            raise DeployError(
                f"{name} has layers that PyTorch quantised, which cannot be exported; export "
                "the float32 network, and let build-engine --int8 quantise it"
            )


def functions_uncompiled() -> AbstractContextManager[object]:
    """While it is entered, functions that torch.compile made run as they were before."""
    if "torch._dynamo" not in sys.modules:  # which takes a second to load, and that they have done
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def uncompiled(model: nn.Module, note: Callable[[str], None], name: str) -> nn.Module:
    """The module without what torch.compile put into it: itself, or a copy where parts of it are compiled."""
    parts = dict(nn.Module.named_modules(model))
    wrapped = [path for path, part in parts.items() if path and isinstance(getattr(part, "_orig_mod", None), nn.Module)]
    if not wrapped and not any(getattr(part, "_compiled_call_impl", None) is not None for part in parts.values()):
        return model
    model = copy.deepcopy(model)  # which leaves what was compiled behind
    for path in wrapped:
        if path.endswith("._orig_mod"):
            continue
        parent, _, child = path.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, owner.get_submodule(child)._orig_mod)
    note(f"{name} was compiled; it is exported as it was before")
    return model
