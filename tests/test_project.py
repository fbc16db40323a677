"""The project itself: floors, start-up time of imports, packaging, the README's words."""

import ast
import re
import tomllib

from helpers import ROOT, needs

FLOORS = ["runtime", "calibration", "fcn", "export"]


def module_of(path):
    """fcn_deploy's dotted name of a file in one of the floors."""
    names = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("fcn_deploy", *(names[:-1] if names[-1] == "__init__" else names)))


def imports(path):
    """Dotted names of all that a file imports, relative ones resolved, lazy ones too."""
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(part for part in (start, node.module) if part)
            yield from (f"{module}.{name.name}" for name in node.names)


def test_each_floor_imports_only_what_is_below_it():
    for index, floor in enumerate(FLOORS):
        above = {f"fcn_deploy.{name}" for name in FLOORS[index + 1 :]}
        for path in (ROOT / floor).rglob("*.py"):
            assert not above & {".".join(name.split(".")[:2]) for name in imports(path)}, f"{path} imports upward"


def test_the_runtime_imports_relatively_and_the_other_floors_absolutely():
    for floor in FLOORS:
        for path in (ROOT / floor).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("fcn_deploy")):
                    assert bool(node.level) == (floor == "runtime"), f"{path}:{node.lineno}"


def test_no_two_modules_import_each_other_not_even_by_way_of_others():
    """Imports within functions count: a circle hidden so is one all the same."""
    files = [ROOT / "fcn_deploy" / "__init__.py", *(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))]
    modules = {"fcn_deploy" if path.parent.name == "fcn_deploy" else module_of(path): path for path in files}

    def module_in(name):
        """The longest part of a dotted name that is a module: what is behind it is a name in that module."""
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name

    imported = {module: {module_in(name) for name in imports(path)} - {"", module} for module, path in modules.items()}

    def reached_from(module):
        seen, left = set(), [module]
        while left:
            new = imported[left.pop()] - seen
            seen |= new
            left += new
        return seen

    reached = {module: reached_from(module) for module in modules}
    circles = [f"{one} ↔ {other}" for one in modules for other in reached[one] if one < other and one in reached[other]]
    assert not circles, "\n".join(circles)


def functions():
    """(file, function) of every function in the floors."""
    for floor in FLOORS:
        for path in (ROOT / floor).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield path, node


def test_functions_fit_on_a_screen():
    long = [
        f"{path.relative_to(ROOT)}: {node.name}, {lines} lines"
        for path, node in functions()
        if (lines := node.end_lineno - node.lineno + 1) > 80
    ]
    assert not long, "\n".join(long)


def test_no_block_is_of_radons_worst_ranks():
    visitor = needs("radon.complexity")
    worst = [
        f"{path.relative_to(ROOT)}: {block.fullname}, {block.complexity}"
        for floor in FLOORS
        for path in (ROOT / floor).rglob("*.py")
        for block in visitor.cc_visit(path.read_text())
        if visitor.cc_rank(block.complexity) in "EF"
    ]
    assert not worst, "\n".join(worst)


def test_no_folder_of_tests_is_left_out(pytestconfig):
    left = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")} & set(
        pytestconfig.getini("norecursedirs")
    )
    assert not left, left


def test_torch_is_imported_where_networks_are_and_nowhere_else():
    allowed = [ROOT / "fcn", ROOT / "export" / "from_torch"]
    for floor in FLOORS:
        for path in (ROOT / floor).rglob("*.py"):
            if "torch" in {name.split(".")[0] for name in imports(path)}:
                assert any(path.is_relative_to(place) for place in allowed), f"{path} imports torch"


def test_every_module_says_what_it_is_for():
    for floor in [*FLOORS, "benchmarks"]:
        for path in (ROOT / floor).rglob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_the_map_of_the_architecture_names_all_that_is_in_the_tree_and_nothing_else():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for floor in FLOORS:
        rows = text.partition(f"### {floor}\n")[2].partition("\n\nBeside the floors")[0].partition("\n### ")[0]
        named = {word.rstrip("/") for row in re.findall(r"^\| (.+?) \|", rows, re.MULTILINE) for word in row.split("`")}
        there = {path.name for path in (ROOT / floor).iterdir() if path.is_dir() or path.suffix == ".py"}
        there -= {"__init__.py", "__pycache__"}
        assert not there - named, f"not on the map of {floor}: {sorted(there - named)}"
        gone = {name for name in named if re.fullmatch(r"[a-z_]+(\.py)?", name) and not (ROOT / floor / name).exists()}
        assert not gone, f"on the map of {floor} and not there: {sorted(gone)}"


def test_every_pass_is_said_to_be_used_by_something():
    said = ast.get_docstring(ast.parse((ROOT / "export" / "passes" / "__init__.py").read_text()))
    passes = {path.stem for path in (ROOT / "export" / "passes").glob("*.py")} - {"__init__", "result"}
    assert not passes - set(re.findall(r"\w+", said))


def test_files_that_packages_name_are_there():
    for floor in FLOORS:
        for init in (ROOT / floor).rglob("__init__.py"):
            named = re.findall(r"(?<![\w/])\w+\.(?:py|cu)\b", ast.get_docstring(ast.parse(init.read_text())))
            gone = [name for name in named if not (init.parent / name).exists()]
            assert not gone, f"{init} names {gone}"


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
    assert not [extra for extra in extras if "pycuda" in set(packages(extra))]  # it compiles, and many cannot
    assert not {"torch", "onnx", "onnxruntime"} & {re.split("[<>=]", item)[0] for item in project["dependencies"]}


def test_every_command_of_the_project_exists():
    import importlib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["scripts"]) == {
        "train-fcn",
        "eval-fcn",
        "export-onnx",
        "export-triton",
        "build-engine",
        "inspect-model",
        "verify-engine",
        "bench-engine",
        "label-images",
        "serve-engine",
    }
    for target in project["scripts"].values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))
