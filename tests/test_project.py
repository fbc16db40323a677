"""The project itself: floors, start-up time of imports, packaging, the README's words."""

import ast
import re
import tomllib

from helpers import ROOT

FLOORS = ["runtime", "calibration", "fcn", "export"]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def test_each_floor_imports_only_what_is_below_it():
    for index, floor in enumerate(FLOORS):
        above = set(FLOORS[index + 1 :])
        for path in (ROOT / floor).rglob("*.py"):
            assert not above & set(imports(path)), f"{path} imports upward"


def test_torch_is_imported_where_networks_are_and_nowhere_else():
    allowed = [ROOT / "fcn", ROOT / "export" / "to_onnx.py"]
    for floor in FLOORS:
        for path in (ROOT / floor).rglob("*.py"):
            if "torch" in set(imports(path)):
                assert any(path.is_relative_to(place) for place in allowed), f"{path} imports torch"


def test_every_module_says_what_it_is_for():
    for floor in [*FLOORS, "benchmarks"]:
        for path in (ROOT / floor).rglob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_extras_never_bring_both_onnxruntimes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def packages(extra):
        for requirement in extras[extra]:
            if inner := re.match(r"fcn-deploy\[(.+)\]", requirement):
                for name in inner[1].split(","):
                    yield from packages(name)
            else:
                yield re.split(r"[<>=\[]", requirement)[0]

    for extra in extras:
        assert not {"onnxruntime", "onnxruntime-gpu"} <= set(packages(extra)), extra
    assert {"onnxruntime-gpu", "tensorrt", "pycuda"} <= set(packages("gpu"))
    assert not {"torch", "onnx", "onnxruntime"} & {re.split("[<>=]", item)[0] for item in project["dependencies"]}


def test_every_command_of_the_project_exists():
    import importlib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["scripts"]) == {
        "train-fcn",
        "eval-fcn",
        "export-onnx",
        "build-engine",
        "inspect-model",
        "verify-engine",
        "bench-engine",
    }
    for target in project["scripts"].values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))
