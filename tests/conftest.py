"""What the tests share: networks exported once a run, trained weights, the simulated GPU, and a part to run alone."""

import gc
import logging
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
from gpu_engines import gpu_built, gpu_engine, rtx_engine, tensorrt_engine  # noqa: F401
from helpers import checkpoint_of, needs_shared, random_network
from preloaded import SMALL_SIZES

TESTS = Path(__file__).parent
# The longest first, by the seconds that --durations=0 adds up to; of the others those with most slow tests come first.
LONG_FILES = (
    "test_benchmarks.py",
    "export/test_zoo.py",
    "export/quantization/test_mixed_precision.py",
    "export/build/test_engine.py",
    "export/test_from_torch.py",
    "runtime/test_openvino.py",
    "export/build/test_cut_stages.py",
    "fcn/test_bands.py",
    "runtime/test_tensorrt.py",
    "export/dynamic_shapes/test_free_sizes.py",
    "test_end_to_end.py",
    "test_readme.py",
    "export/build/test_autotune.py",
    "runtime/test_video_streams.py",
    "test_silicon.py",
    "runtime/test_bulk.py",
    "export/quantization/test_quantize.py",
    "export/test_library_networks.py",
    "export/build/test_tensorrt.py",
    "fcn/test_train.py",
    "runtime/serve/test_command.py",
    "export/build/test_engine_matrix.py",
    "runtime/test_cluster.py",
)


def pytest_addoption(parser):
    parser.addoption(
        "--fast", action="store_true",
        help="leave out tests marked slow, and all but the first case of each other: a part of each package, minutes",
    )  # fmt: skip


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):  # long files first, so that no worker is left alone with one at the end
        slow, tests = Counter(item.path for item in items if item.get_closest_marker("slow")), Counter()
        tests.update(item.path for item in items)
        long = {TESTS / name: place - len(LONG_FILES) for place, name in enumerate(LONG_FILES)}
        assert all(path.exists() for path in long), "LONG_FILES of conftest.py names a file that is not there"
        items.sort(key=lambda item: (long.get(item.path, 0), -slow[item.path], -tests[item.path]))
    for item in items:
        if "gpu" in item.fixturenames:
            item.add_marker("gpu_sim")
    if config.getoption("--fast"):
        seen, kept, left = set(), [], []
        for item in items:
            test = item.parent.nodeid, item.originalname
            (left if test in seen or item.get_closest_marker("slow") else kept).append(item)
            seen.add(test)
        items[:] = kept
        config.hook.pytest_deselected(items=left)


@pytest.fixture(scope="session", autouse=True)
def little_is_measured():
    """Engines that tests build in this process are timed at small sizes, and keep the estimate of their memory.

    What is measured of networks as small as these is mostly chance, and tests have budgets of a few megabytes. Commands
    measure both in small images, and as for their users where a test says `measured` (`tests/preloaded.py`).
    """
    from fcn_deploy.export.build.targets import cpu
    from fcn_deploy.runtime import latency

    with (
        mock.patch.object(cpu, "with_measured_memory", lambda draft, threads=None: draft),
        mock.patch.object(cpu, "TIMED_SIZES", SMALL_SIZES),
        mock.patch.object(cpu, "TILED_SIZE", SMALL_SIZES[0]),
        mock.patch.object(latency, "TIMED_SIZES", SMALL_SIZES),
    ):
        yield


@pytest.fixture(autouse=True)
def logs_are_heard():
    """Whatever a library that an earlier test used has done to logging (Ray, servers, exporters)."""
    logging.disable(logging.NOTSET)
    logging.root.setLevel(logging.WARNING)
    for name, logger in logging.root.manager.loggerDict.items():
        if name.split(".")[0] == "fcn_deploy" and isinstance(logger, logging.Logger):
            logger.disabled, logger.propagate = False, True
            logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    """Folder of a run's exports: narrow.safetensors, narrow.onnx and narrow.engine (5 classes, FCN-8s)."""
    from fcn_deploy.export.build.config import BuildConfig
    from fcn_deploy.export.build.engine import build_engine
    from fcn_deploy.export.from_torch import export_module
    from fcn_deploy.export.importer.import_model import import_model
    from fcn_deploy.fcn.checkpoint import save_checkpoint

    folder = tmp_path_factory.mktemp("exports")
    checkpoint = checkpoint_of(random_network())
    save_checkpoint(folder / "narrow.safetensors", checkpoint)
    export_module(checkpoint.model, checkpoint.card, folder / "narrow.onnx")
    build_engine(import_model(folder / "narrow.onnx"), folder / "narrow.engine", BuildConfig(latency_sizes=[(64, 64)]))
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Folder with camvid.safetensors, .onnx and .engine, from the weights beside the project."""
    from fcn_deploy.calibration.datasets import CAMVID_COLORS
    from fcn_deploy.export.build.config import BuildConfig
    from fcn_deploy.export.build.engine import build_engine
    from fcn_deploy.export.from_torch import export_module
    from fcn_deploy.export.importer.import_model import import_model
    from fcn_deploy.fcn.architecture import Architecture
    from fcn_deploy.fcn.checkpoint import Checkpoint, save_checkpoint
    from fcn_deploy.fcn.model import build_network
    from safetensors.torch import load_file

    from fcn_deploy import ModelCard

    state = load_file(needs_shared("camvid-lite0-fcn8s.safetensors"))
    names = {
        "stem.0": "backbone._conv_stem", "stem.1": "backbone._bn0", "blocks": "backbone._blocks",
        "head.0": "backbone._conv_head", "head.1": "backbone._bn1", "s3": "score.8", "s4": "score.16", "s5": "score.32",
    }  # fmt: skip
    renamed = {}
    for name, tensor in state.items():
        old = next(prefix for prefix in names if name.startswith(f"{prefix}."))
        renamed[names[old] + name[len(old) :]] = tensor
    model = build_network(Architecture(classes=11))
    model.load_state_dict(renamed)
    card = ModelCard(
        tuple(CAMVID_COLORS), tuple(CAMVID_COLORS.values()), mean=(123.675, 116.28, 103.53), std=(58.4, 57.12, 57.38),
        stride=8, size_multiple=32,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("trained")
    save_checkpoint(folder / "camvid.safetensors", Checkpoint(model.eval(), card))
    export_module(model, card, folder / "camvid.onnx")
    build_engine(import_model(folder / "camvid.onnx"), folder / "camvid.engine", BuildConfig(latency_sizes=[(64, 64)]))
    return folder


@pytest.fixture
def gpu():
    """The simulated GPU (the package gpu_sim), ready for pycuda.

    At the end nothing may be misused, so a test that misuses it on purpose looks at gpu.misuse() and gpu.clear()s it.
    """
    import gpu_sim

    if reason := gpu_sim.missing():
        pytest.skip(reason)
    gpu_sim.install()
    gc.collect()  # what earlier tests left in cycles holds contexts
    gpu_sim.reset()
    import pycuda.driver

    pycuda.driver.init()
    yield gpu_sim
    wrong = gpu_sim.misuse()
    gpu_sim.reset()
    assert not wrong, wrong


@pytest.fixture
def cuda(gpu):
    """pycuda.driver with a context of its own current."""
    import pycuda.driver

    context = pycuda.driver.Device(0).make_context()
    yield pycuda.driver
    context.pop()
