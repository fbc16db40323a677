"""ONNX Runtime's providers for NVIDIA GPUs: their libraries loaded first, and the truth where they cannot be."""

import ctypes
import io
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import DeployError, MisuseError, one_line
from ..extras import need
from . import ORT_TARGETS

log = logging.getLogger(__name__)

PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"  # package of the provider that is a library of its own
_LIBRARIES = {"ort-cuda": "cuda", "ort-tensorrt": "tensorrt"}  # target → name in the file of its provider
_registering = threading.Lock()

Providers = Sequence[str | tuple[str, dict[str, Any]]]


def gpu_providers(target: str, device: int, source: str) -> Providers:
    """The providers for `ort-cuda` or `ort-tensorrt`, on GPU number `device`, with what they need loaded.

    Raises:
        DeployError: this onnxruntime has no such provider.
    """
    runtime = need("onnxruntime", target)
    wanted = ORT_TARGETS[target]
    if wanted not in runtime.get_available_providers():
        raise DeployError(
            f"{source} is an engine for {target}, and onnxruntime {runtime.__version__} here has no {wanted}; run: pip "
            f"uninstall onnxruntime; pip install 'fcn-deploy[{target}]', or build one with --target cpu"
        )
    _preload(runtime, target)
    place = {"device_id": device}
    providers: list[str | tuple[str, dict[str, Any]]] = [(wanted, place)]
    if target == "ort-tensorrt":  # CUDA takes what TensorRT cannot
        providers.append(("CUDAExecutionProvider", place))
    return [*providers, "CPUExecutionProvider"]


def _preload(runtime: ModuleType, target: str) -> None:
    """Load the libraries of NVIDIA's wheels, which the system does not find by itself."""
    if hasattr(runtime, "preload_dlls"):  # from 1.21 on
        with quietly():  # it prints what it does not find
            runtime.preload_dlls()
    if target == "ort-tensorrt":
        try:
            import_module("tensorrt")  # loads libnvinfer, which the provider then finds
        except Exception as error:  # not installed, or its libraries are not
            log.debug("tensorrt: %s", error)


@contextmanager
def quietly() -> Iterator[None]:
    """In it what onnxruntime prints on standard output, of libraries that it cannot load, goes to logging."""
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            yield
    finally:
        for line in said.getvalue().splitlines():
            log.debug("%s", line)


def not_loaded(target: str, source: str) -> DeployError:
    """Why a provider fell back to the CPU: the library that its own is missing, and what installs it."""
    runtime = import_module("onnxruntime")
    folder = Path(runtime.__file__ or "").parent / "capi"
    reason = "the driver, or a library of CUDA or cuDNN, is missing"
    name = "onnxruntime_providers_{}.dll" if os.name == "nt" else "libonnxruntime_providers_{}.so"
    try:
        ctypes.CDLL(str(folder / name.format("shared")), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / name.format(_LIBRARIES[target])))
    except (OSError, KeyError) as error:
        reason = one_line(error, 90).removeprefix(f"{folder}{os.sep}")
    else:
        reason = unusable() or reason
    if "libcuda.so" in reason:
        remedy = "install NVIDIA's driver, or build one with --target cpu"
    elif reason.startswith("there is no GPU"):
        remedy = "run it on the GPU's machine, or build one with --target cpu"
    elif reason.startswith("the driver here"):
        remedy = "update the driver, or build one with --target cpu"
    else:
        remedy = f"run: pip install 'fcn-deploy[{target}]', or build one with --target cpu"
    return DeployError(
        f"{source}: {ORT_TARGETS[target]} of onnxruntime {runtime.__version__} cannot be loaded ({reason}); {remedy}"
    )


def unusable() -> str:
    """Why the driver runs no GPU for this ONNX Runtime; empty where it does, or there is none."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return ""
    if code := driver.cuInit(0):
        return f"there is no GPU that the driver can use: cuInit gives {code}"
    version = ctypes.c_int()
    wanted = str(getattr(import_module("onnxruntime"), "cuda_version", "")).split(".")[0]
    if driver.cuDriverGetVersion(ctypes.byref(version)) or not wanted.isdigit() or version.value // 1000 >= int(wanted):
        return ""
    return f"the driver here is of CUDA {version.value // 1000}.{version.value % 1000 // 10}, and it of CUDA {wanted}"


def plugin_devices(device: int, source: str) -> list[Any]:
    """The GPU number `device`, as the plugin for TensorRT for RTX offers it: for `add_provider_for_devices`.

    Raises:
        DeployError: no plugin, an onnxruntime without plugins, or no driver or GPU that it takes.
        MisuseError: fewer GPUs.
    """
    runtime = need("onnxruntime", "ort-rtx")
    plugin = need(PLUGIN, "ort-rtx")
    if not hasattr(runtime, "register_execution_provider_library"):
        raise DeployError(
            f"onnxruntime {runtime.__version__} takes no provider as a plugin; run: pip install 'onnxruntime>=1.24'"
        )
    name = plugin.get_ep_name()
    with _registering:  # a second registration of a name is refused
        found = [each for each in runtime.get_ep_devices() if each.ep_name == name]
        if not found:
            try:
                runtime.register_execution_provider_library(name, plugin.get_library_path())
            except Exception as error:  # ONNX Runtime's errors share no base class but Exception
                missing = "libcuda.so" in str(error) or "nvcuda.dll" in str(error)
                reason = "no NVIDIA driver is installed here" if missing else one_line(error, 140)
                raise DeployError(
                    f"{source} is an engine for ort-rtx, and its provider cannot be loaded ({reason}); run it on the "
                    "GPU's machine, or build one with --target cpu"
                ) from error
            found = [each for each in runtime.get_ep_devices() if each.ep_name == name]
    if not found:
        raise DeployError(
            f"{source} is an engine for ort-rtx, and {name} takes no GPU here; it wants an RTX GPU (compute capability "
            "8.0 or newer) and a driver for CUDA 13; build one with --target ort-cuda or cpu"
        )
    if device >= len(found):
        raise MisuseError(f"device cuda:{device}: {name} offers {len(found)} GPUs here, counted from 0")
    return [found[device]]
