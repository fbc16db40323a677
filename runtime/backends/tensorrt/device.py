"""The GPU, its driver and TensorRT, checked before anything of an engine is loaded: each refusal is one line."""

import hashlib
import logging
import os
import platform
import re
import threading
from collections.abc import Mapping
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from ...engine_format.manifest import GpuPlan
from ...errors import DeployError, MisuseError, one_line
from ...extras import need
from .. import KERNELS_PTX, OLDEST_GPU, RTX_GPUS, kernels_for

log = logging.getLogger(__name__)


def name_of(device: Any) -> str:
    """Of a GPU's compute capability: `sm89`."""
    return "sm{}{}".format(*device.compute_capability())


def driver_module() -> ModuleType:
    """cuda.bindings, or pycuda's driver: both have the same names. Raises DeployError where neither is installed."""
    try:
        return import_module(".cuda_bindings", __package__)
    except ImportError:
        try:
            return need("pycuda.driver", "rtx")
        except DeployError as error:
            if "libcuda" in str(error.__cause__):
                raise
            raise DeployError("cuda.bindings is not installed; run: pip install cuda-bindings") from error


def open_driver(source: str, targets: tuple[str, ...]) -> ModuleType:
    """The driver, ready: see `driver_module`. Raises DeployError where there is none, or no GPU."""
    where = f"{source} is an engine for {','.join(targets)}"
    try:
        cuda = driver_module()
    except DeployError as error:
        if "libcuda" not in str(error.__cause__):
            raise
        raise DeployError(
            f"{where}, and no NVIDIA driver is installed here; run it on the GPU's machine, or build one with --target "
            "cpu"
        ) from error
    try:
        cuda.init()
    except cuda.Error as error:
        raise DeployError(
            f"{where}, and no NVIDIA GPU can be used here ({one_line(error, 120)}); run it on the GPU's machine, or "
            "build one with --target cpu"
        ) from error
    return cuda


def platform_name() -> str:
    """System and processor of this machine, which a plan is built for: `linux-x86_64`."""
    machine = platform.machine().lower()
    return f"{platform.system().lower()}-{ {'amd64': 'x86_64', 'arm64': 'aarch64'}.get(machine, machine) }"


def _is_for_this_platform(gpu: GpuPlan) -> bool:
    """Plans of TensorRT are of one system; those of TensorRT for RTX run on Linux and Windows alike (its guide, "Build
    the Engine"), and of neither is it said that they run on another kind of processor."""
    if gpu.library == "tensorrt_rtx":
        return gpu.platform.rpartition("-")[2] in ("", platform_name().rpartition("-")[2])
    return gpu.platform in ("", platform_name())


def open_device(cuda: ModuleType, index: int, gpu: GpuPlan, source: str) -> Any:
    """GPU number `index`, the driver's. Raises MisuseError; DeployError where the plan is for others."""
    if not _is_for_this_platform(gpu):
        raise DeployError(
            f"{source} has a plan for {gpu.platform}, and this is {platform_name()}: it does not run here; run on "
            "this machine: build-engine MODEL.onnx --target cuda"
        )
    count = cuda.Device.count()
    if index >= count:
        raise MisuseError(f"device cuda:{index}: there are {count} GPUs here, counted from 0")
    device = cuda.Device(index)
    found = name_of(device)
    if found not in gpu.targets and not gpu.portable:
        raise DeployError(
            f"{source} is for {', '.join(gpu.targets)}, and this GPU ({device.name()}) is {found}; {_remedy(found)}"
        )
    return device


def _remedy(target: str) -> str:
    """How an engine for a GPU is built."""
    if int(target[2:]) < int(OLDEST_GPU[2:]):
        return f"no library here has plans for GPUs before {OLDEST_GPU}: build one with --target cpu"
    if target in RTX_GPUS:
        return f"build it with --target {target}, or on this machine with --target cuda"
    return "build it on this machine with --target cuda"


def open_library(cuda: ModuleType, gpu: GpuPlan, source: str) -> ModuleType:
    """The library that a plan is for.

    Raises DeployError where it is absent, of a version that cannot load the plan, or of a newer CUDA than the driver's.
    """
    name, version = gpu.library, gpu.version
    library = _imported(cuda, name, version)
    if not _loads(gpu, library.__version__):
        package = next(iter(_wheels(name)), "tensorrt-rtx-cu13" if name == "tensorrt_rtx" else "tensorrt")
        raise DeployError(
            f"{source} was built by {name} {version}, and {library.__version__} is installed; plans fit one version: "
            f"run pip install '{package}=={version}', or build it again"
        )
    _check_driver(cuda, name, library.__version__)
    return library


def _imported(cuda: ModuleType, name: str, version: str) -> ModuleType:
    """The library, of whichever version is here. Raises DeployError with the line that installs one for the plan."""
    newer = name == "tensorrt_rtx" or cuda.get_driver_version() >= 13000
    extra = "rtx" if name == "tensorrt_rtx" else "tensorrt" if newer else "tensorrt-cu12"
    try:
        return need(name, extra)
    except DeployError as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        package = f"{name.replace('_', '-')}-cu{13 if newer else 12}"
        raise DeployError(
            f"{name} is not installed; run: pip install 'fcn-deploy[{extra}]' '{package}=={version}', the version that "
            "built the plan"
        ) from error


def _check_driver(cuda: ModuleType, name: str, version: str) -> None:
    """Raise DeployError where the wheel of a library is of a newer CUDA than the driver: it would not start."""
    found, driver = _wheels(name), cuda.get_driver_version()
    if not found or driver // 1000 >= int(found[0][-2:]):
        return
    instead = f", or run: pip uninstall {found[0]}; pip install 'fcn-deploy[tensorrt-cu12]'"
    raise DeployError(
        f"{name} {version} is of CUDA {found[0][-2:]} ({found[0]}), and the driver here of CUDA {cuda_version(cuda)}; "
        f"update the driver (580 or newer){instead if name == 'tensorrt' else ''}"
    )


def _wheels(name: str) -> list[str]:
    """The wheels of a library that are installed, of CUDA 12 and 13."""
    return [wheel for major in (12, 13) if _installed(wheel := f"{name.replace('_', '-')}-cu{major}")]


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def cuda_version(cuda: ModuleType) -> str:
    """The newest CUDA that the driver runs: `13.0`."""
    version = cuda.get_driver_version()
    return f"{version // 1000}.{version % 1000 // 10}"


def _loads(gpu: GpuPlan, installed: str) -> bool:
    """Whether a version of the library loads a plan: its own, or a later one where the plan was built for that.

    Of TensorRT 10 also by 11, and by none older than the builder (TensorRT's support matrix, "Engine Portability").
    """
    built, found = ([int(part) for part in re.findall(r"\d+", text)[:3]] for text in (gpu.version, installed))
    if built == found:
        return True
    return gpu.version_compatible and built < found and (found[0] == built[0] or (built[0], found[0]) == (10, 11))


def load_kernels(cuda: ModuleType, kernels: Mapping[str, bytes], device: Any, source: str) -> Any:
    """Our kernels: machine code for this GPU where the engine has it, else PTX, which the driver compiles."""
    exact = kernels_for(name_of(device))
    problem = "it has none"
    for name in (exact, KERNELS_PTX):
        if name in kernels:
            try:
                return cuda.module_from_buffer(kernels[name])
            except cuda.Error as error:
                problem = one_line(error, 90)
    raise DeployError(
        f"{source}: its GPU kernels cannot be loaded ({problem}){_versions(cuda, kernels)}; update the driver, or "
        f"{_remedy(name_of(device))}"
    )


def _versions(cuda: ModuleType, kernels: Mapping[str, bytes]) -> str:
    """The CUDA version of the driver, and that of the PTX, where both are known."""
    wanted = re.search(rb"^\.version (\d+\.\d+)", kernels.get(KERNELS_PTX, b""), re.MULTILINE)
    return "" if wanted is None else f", PTX {wanted[1].decode()} by a driver of CUDA {cuda_version(cuda)}"


def cache_path(plan: bytes, device: Any) -> Path | None:
    """Where TensorRT for RTX keeps what it compiled for a plan on a GPU: it is code, so in the user's own folder.

    None for a user who has none: a user id that the system does not know, as in containers.
    """
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    digest = hashlib.sha256(plan).hexdigest()[:32]
    return base / "fcn-deploy" / f"{digest}-{name_of(device)}.rtx-cache"


@cache
def logger_of(trt: ModuleType) -> Any:
    """The logger of `trt` in this process; its `said()` is the last error of this thread that was not told yet.

    There is one, and it is never given back: TensorRT keeps a pointer to the first that it is given, for messages
    of whatever comes later, and says so where it gets another.
    """

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]  # of a module that is chosen at run time
        """Passes messages to logging, and keeps the last error for ours."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.mine = threading.local()

        def log(self, severity: Any, message: str) -> None:
            kinds = trt.ILogger.Severity
            text = " ".join(message.split())
            if severity in (kinds.ERROR, kinds.INTERNAL_ERROR):
                self.mine.last = text[:300]
                log.debug("%s", text)
            elif severity == kinds.WARNING:
                log.debug("%s", text)

        def said(self) -> str:
            last, self.mine.last = getattr(self.mine, "last", ""), ""
            return last or "no reason given"

    return Log()
