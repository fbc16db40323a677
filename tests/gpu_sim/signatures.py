"""What NVIDIA's Python bindings of TensorRT take: names, arguments and enums, as their own help spells them.

signatures.json, beside this, has them of three versions; `real_bindings.py FOLDER LIBRARIES signatures` prints one.
"""

import inspect
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")
# What the builder and the runtime use, and what these hand to each other.
CLASSES = (
    "Builder", "BuilderFlag", "DataType", "EngineInspector", "ExecutionContextAllocationStrategy",
    "HardwareCompatibilityLevel", "IBuilderConfig", "ICudaEngine", "IErrorRecorder", "IExecutionContext",
    "IHostMemory", "ILogger", "ILogger.Severity", "INetworkDefinition", "IOptimizationProfile", "IProgressMonitor",
    "IRuntimeConfig", "ITensor", "ITimingCache", "LayerInformationFormat", "Logger", "MemoryPoolType",
    "NetworkDefinitionCreationFlag", "OnnxParser", "ProfilingVerbosity", "Runtime", "RuntimePlatform",
    "TensorIOMode", "TensorLocation",
)  # fmt: skip

Argument = list[Any]  # its name, its type, and whether it may be left out
Overload = list[Any]  # [arguments after self, type of what is given]


def read(version: str) -> dict[str, Any]:
    """The signatures of a version: a key of signatures.json."""
    return json.loads(FILE.read_text())[version]


def of(module: types.ModuleType) -> dict[str, Any]:
    """{"version", "classes": {name: {"base", "methods", "properties" (name: may it be set), "members" (of enums)}}}."""
    classes = {}
    for path in CLASSES:
        kind: Any = module
        for name in path.split("."):
            kind = getattr(kind, name, None)
        if kind is not None:
            classes[path] = _of_class(kind)
    return {"version": module.__version__, "classes": classes}


def _of_class(kind: type) -> dict[str, Any]:
    base = next((each.__name__ for each in kind.__mro__[1:] if each.__name__ in CLASSES), "")
    found: dict[str, Any] = {"base": base, "methods": {}, "properties": {}, "members": {}}
    if hasattr(kind, "__members__"):
        found["members"] = {name: int(value) for name, value in kind.__members__.items()}
        return found
    for name in dir(kind):
        value = inspect.getattr_static(kind, name)
        if isinstance(value, property):
            found["properties"][name] = value.fset is not None
        elif callable(value) and (not name.startswith("_") or name == "__init__"):
            found["methods"][name] = overloads(name, getattr(kind, name).__doc__ or "")
    return found


def overloads(name: str, text: str) -> list[Overload]:
    """What help says of a method: [] where it says nothing, as of constructors that Python may not call."""
    found = re.findall(rf"^(?:\d+\. )?{name}\((.*)\)(?: -> (.*))?$", text, re.MULTILINE)
    return [
        [[_argument(each) for each in _divided(inside)[1:]], gives] for inside, gives in found if "*args" not in inside
    ]


def _divided(text: str) -> list[str]:
    """Arguments, divided at commas that are in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[({<") - (letter in "])}>")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _argument(text: str) -> Argument:
    name, _, rest = text.partition(": ")
    kind, _, default = rest.partition(" = ")
    return [name, kind, default != ""]


def main() -> None:
    """`python signatures.py 11=printed.json …`: put what real_bindings.py printed into signatures.json."""
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    for word in sys.argv[1:]:
        version, _, path = word.partition("=")
        found[version] = json.loads(Path(path).read_text())
    lines = []
    for version, each in found.items():  # a class a line
        rows = [f"{json.dumps(name)}: {json.dumps(kind)}" for name, kind in each["classes"].items()]
        classes = ",\n".join(rows)
        lines.append(f'"{version}": {{"version": "{each["version"]}", "classes": {{\n{classes}\n}}}}')
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
