"""Engines for the simulated GPU; conftest.py has the fixtures for all tests."""

import gc
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import needs

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "runtime" / "backends" / "tensorrt" / "kernels.cu"
SIZES = "1x1:64x64:128x160,64x64:160x192:256x256,128x128:224x320:320x416"


@pytest.fixture(scope="session")
def gpu_built(exports, tmp_path_factory):
    """narrow.engine for sm89 with three profiles, and its core for the simulation."""
    needs("tensorrt_rtx")
    from fcn_deploy.export.build.config import BuildConfig
    from fcn_deploy.export.build.core import core_of, optimise_offline
    from fcn_deploy.export.build.engine import build_engine
    from fcn_deploy.export.importer.import_model import import_model
    from fcn_deploy.runtime.sizes import parse_sizes

    folder = tmp_path_factory.mktemp("gpu")
    source = import_model(exports / "narrow.onnx")
    build_engine(source, folder / "m.engine", BuildConfig(target="sm89", sizes=parse_sizes(SIZES)))
    return folder / "m.engine", optimise_offline(core_of(source).model).SerializeToString()


def profiles_of(plan):
    return [{"image": ((1, 3, *p.min), (1, 3, *p.opt), (p.batch, 3, *p.max))} for p in plan.profiles]


@pytest.fixture(params=["tensorrt_rtx", "tensorrt"])
def gpu_engine(request, gpu, gpu_built, tmp_path, monkeypatch):
    """An engine of either library, ready to be opened: its path. One runs by cuda.bindings, the other by pycuda."""
    if request.param == "tensorrt":
        monkeypatch.setitem(sys.modules, "fcn_deploy.runtime.backends.tensorrt.cuda_bindings", None)
    yield from ready(gpu, gpu_built, tmp_path, request.param)


@pytest.fixture
def rtx_engine(gpu, gpu_built, tmp_path):
    yield from ready(gpu, gpu_built, tmp_path, "tensorrt_rtx")


@pytest.fixture
def tensorrt_engine(gpu, gpu_built, tmp_path):
    """An engine of TensorRT, whose CUDA graphs are captured by us."""
    yield from ready(gpu, gpu_built, tmp_path, "tensorrt")


def ready(gpu, built, folder, library):
    from fcn_deploy.runtime.engine_format.engine_file import EngineFile, write_engine
    from gpu_sim import tensorrt_sim

    path, core = built
    gpu.load_kernels(KERNELS)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    with gpu.tensorrt(library) as module:
        with EngineFile(path) as file:
            members = {name: file.read(name) for name in file.manifest.members}
            plan = replace(file.manifest.gpu, library=library, version=module.__version__)
            write_engine(folder / "m.engine", replace(file.manifest, gpu=plan), members)
        tensorrt_sim.register(members["stage-0.plan"], core, profiles_of(plan))
        yield folder / "m.engine"
    del os.environ["XDG_CACHE_HOME"]
    gc.collect()


def changed(path, out, **changes):
    """The engine with other entries in its GPU plan."""
    from fcn_deploy.runtime.engine_format.engine_file import EngineFile, write_engine

    with EngineFile(path) as file:
        members = {name: file.read(name) for name in file.manifest.members}
        manifest = file.manifest
    members = changes.pop("members", lambda m: m)(members)
    write_engine(out, replace(manifest, gpu=replace(manifest.gpu, **changes)), members)
    return out
