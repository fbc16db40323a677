"""What is installed: one package and a shim, which a user's own files of the same names do not disturb."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, finished

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMMANDS = sorted(PROJECT["project"]["scripts"])
FOLDERS = ("fcn_deploy", "runtime", "calibration", "fcn", "export", "shim")


def test_the_list_of_packages_is_the_tree():
    found = {
        ".".join(package.relative_to(ROOT / "shim" if folder == "shim" else ROOT).parts)
        for folder in FOLDERS
        for package in (init.parent for init in (ROOT / folder).rglob("__init__.py"))
    }
    inside = {folder for folder in FOLDERS if folder not in ("fcn_deploy", "shim")}
    mapped = {name for name in PROJECT["tool"]["setuptools"]["package-dir"] if name.startswith("fcn_deploy.")}
    assert mapped == {f"fcn_deploy.{folder}" for folder in inside}
    found = {f"fcn_deploy.{name}" if name.split(".")[0] in inside else name for name in found} | {"runtime"}
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert set(listed) == found and len(listed) == len(found)


def test_every_folder_of_modules_is_a_package():
    for folder in FOLDERS:
        for module in (ROOT / folder).rglob("*.py"):
            assert folder == "shim" or (module.parent / "__init__.py").exists(), module


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The project's wheel, built from a copy of what it is made of."""
    pytest.importorskip("setuptools", "70", reason="setuptools 70 or newer is needed to build a wheel")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out, source)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The programs' folder of an environment with the wheel in it, and the other packages of this one."""
    folder = tmp_path_factory.mktemp("environment")
    finished([sys.executable, "-m", "venv", "--without-pip", folder])
    python = folder / "bin" / "python"
    pip("--python", python, "install", "--no-deps", "--no-index", wheel)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(finished([python, "-c", where], cwd=folder).stdout.strip())
    # Folders that are named in a .pth are searched, and theirs are not read: this checkout itself is not found.
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "others.pth").write_text("\n".join(others))
    return folder / "bin"


@pytest.fixture
def own_files(tmp_path):
    """A folder with modules of a user's that are named as our packages; most must never be imported."""
    for name in ("runtime", "export", "calibration"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('{name} of the user was imported')")
    (tmp_path / "fcn.py").write_text("import torch\n\n\ndef make():\n    return torch.nn.Conv2d(3, 2, 3, padding=1)\n")
    return tmp_path


def pip(*words):
    environment = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    return finished([sys.executable, "-m", "pip", "--quiet", *words], env=environment)


@pytest.mark.slow
def test_a_wheel_holds_one_package_and_the_shim(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fcn_deploy", "runtime"}
    shim = {f"runtime/{path.name}" for path in (ROOT / "shim/runtime").glob("*.py")}
    assert {name for name in names if name.startswith("runtime/")} == shim
    assert {"fcn_deploy/py.typed", "fcn_deploy/runtime/infer.py"} <= set(names)
    in_tree = {
        f"fcn_deploy/{path.relative_to(ROOT)}" for folder in FOLDERS[1:-1] for path in (ROOT / folder).rglob("*.py")
    }
    assert {name for name in names if name.startswith("fcn_deploy/") and name.endswith(".py")} == in_tree | {
        "fcn_deploy/__init__.py"
    }
    for suffix in (".cu", ".html"):  # what is no module, and needed all the same
        assert any(name.endswith(suffix) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_work_beside_a_users_own_files_of_our_names(installed, own_files, name):
    version = PROJECT["project"]["version"]
    assert finished([installed / name, "--version"], cwd=own_files).stdout == f"{name} (fcn-deploy {version})\n"
    shown = finished([installed / name, "--help"], cwd=own_files).stdout
    assert shown.startswith(f"Usage: {name} ") and "--debug" in shown


@pytest.mark.slow
def test_export_onnx_finds_the_users_own_fcn(installed, own_files):
    pytest.importorskip("torch")
    done = finished([installed / "export-onnx", "fcn:make", "-o", "m.onnx"], cwd=own_files)
    assert "fcn:make → m.onnx" in done.stdout and (own_files / "m.onnx").exists()


@pytest.mark.slow
def test_the_public_names_come_from_the_wheel_and_from_the_shim(installed, tmp_path):
    code = "import fcn_deploy, runtime; print(fcn_deploy.__file__); print(runtime.Segmenter is fcn_deploy.Segmenter)"
    file, same = finished([installed / "python", "-c", code], cwd=tmp_path).stdout.split()
    assert Path(file).is_relative_to(installed.parent) and same == "True"


@pytest.mark.slow
def test_imports_of_the_first_layout_work_by_the_shim(installed, tmp_path):
    code = (
        "from runtime.images import read_image; from runtime.regions import open_regions\n"
        "from runtime.engine_file import ModelCard; import fcn_deploy\n"
        "print(read_image.__module__, open_regions.__module__, ModelCard is fcn_deploy.ModelCard)"
    )
    said = finished([installed / "python", "-c", code], cwd=tmp_path).stdout.split()
    assert said == ["fcn_deploy.runtime.images.read", "fcn_deploy.runtime.images.regions", "True"]


@pytest.mark.slow
def test_python_m_runtime_infer_works_by_the_shim_and_in_a_clone(installed, tmp_path):
    for place in (tmp_path, ROOT):
        done = finished([installed / "python", "-m", "runtime.infer", "--help"], cwd=place)
        assert done.stdout.startswith("Usage: python -m runtime.infer ")
    # A clone that is run without an installation, by what its backend needs alone.
    code = "import runtime.infer; print(runtime.infer.__file__)"
    environment = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run(
        [installed / "python", "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()) == ROOT / "runtime" / "infer.py"


def test_onnxruntime_keeps_nothing_of_its_users_in_their_home(tmp_path):
    program = "import fcn_deploy.runtime, onnxruntime, time; time.sleep(0.5)"
    kept = {key: value for key, value in os.environ.items() if key not in ("XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=kept | {"HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0 and not list(tmp_path.rglob("*onnxruntime*")), done.stderr
