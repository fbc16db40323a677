"""NVIDIA's own Python bindings of `tensorrt`, imported without its libraries, for a process of its own.

    python real_bindings.py FOLDER LIBRARIES api           prints {class: {member: names of its arguments}} as JSON
    python real_bindings.py FOLDER LIBRARIES signatures    prints what signatures.json has of a version
    python real_bindings.py FOLDER LIBRARIES build ONNX    builds a plan by our code, and prints what is known of it

FOLDER has the unpacked wheel, LIBRARIES what forward.c was compiled to. `tensorrt_rtx -` is that module, as installed.
"""

import ctypes
import importlib
import json
import os
import re
import sys
import types
from pathlib import Path


def api(module: types.ModuleType) -> dict[str, dict[str, list[list[str]]]]:
    """Class → member → the names of its arguments, of each overload as its help spells them."""
    found: dict[str, dict[str, list[list[str]]]] = {}
    for name, kind in vars(module).items():
        if isinstance(kind, type):
            found[name] = {each: overloads(each, getattr(kind, each).__doc__ or "") for each in dir(kind)}
    return found


def overloads(name: str, text: str) -> list[list[str]]:
    lines = re.findall(rf"^(?:\d+\. )?{name}\((.*)\)", text, re.MULTILINE)
    return [re.findall(r"(\w+):(?!:)", line) for line in lines if line != "*args, **kwargs"]


def main() -> None:
    folder, libraries, what, *rest = sys.argv[1:]
    if libraries != "-":
        for library in Path(libraries).iterdir():
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        sys.path.insert(0, folder)
        bindings = importlib.import_module("tensorrt_bindings")
        module = types.ModuleType("tensorrt")
        vars(module).update({name: value for name, value in vars(bindings).items() if not name.startswith("__")})
        vars(module)["__version__"] = bindings.__version__
    else:
        module = importlib.import_module(folder)
    if what == "api":
        print(json.dumps(api(module)), flush=True)
    elif what == "signatures":
        import signatures  # beside this file

        print(json.dumps(signatures.of(module)), flush=True)
    else:
        print(json.dumps(build(module, Path(rest[0]))), flush=True)
    os._exit(0)  # destructors of what was never meant to be together


def build(module: types.ModuleType, model: Path) -> dict[str, object]:
    from fcn_deploy.export.build.config import TensorRTOptions
    from fcn_deploy.export.build.targets.tensorrt.process import build_here
    from fcn_deploy.export.build.targets.tensorrt.profiles import PlannedProfile

    profiles = [PlannedProfile((64, 96), (96, 96), (128, 128))]
    built = build_here(module, model, TensorRTOptions(), profiles, ("sm89",))
    return {"version": built.version, "bytes": len(built.plan), "activations": built.activation_bytes,
            "layers": len(built.layers)}  # fmt: skip


if __name__ == "__main__":
    main()
