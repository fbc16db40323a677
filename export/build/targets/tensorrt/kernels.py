"""The runtime's CUDA kernels, compiled ahead: machine code for the GPUs that are named, and PTX for all others."""

import ctypes
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from ctypes.util import find_library
from importlib.util import find_spec
from pathlib import Path

from fcn_deploy.runtime.backends import KERNELS_PTX, kernels_for, tensorrt
from fcn_deploy.runtime.errors import DeployError

SOURCE = Path(tensorrt.__file__).parent / "kernels.cu"
PTX = "compute_75"  # the oldest that CUDA 13 knows; a driver compiles it for any newer GPU
# A compiler declares the newest version of PTX that it knows, which older drivers refuse whatever is in it. Our kernels
# are plain arithmetic, which PTX has had all along: CUDA 12.0's is declared, which ptxas accepts (tests).
PTX_VERSION = "8.0"
REFUSED = 3  # exit code of the process that compiles
# Products are rounded before they are added, as NumPy does it on the CPU.
OPTIONS = ("--fmad=false", "--std=c++17")


def compile_kernels(targets: Sequence[str]) -> dict[str, bytes]:
    """Members of an engine file: name → PTX or cubin.

    In a process of its own: NVRTC asks the driver that it finds, and would take this one along where that is broken.

    Args:
        targets: such as sm86; none where the GPU is not known.

    Raises:
        DeployError: neither NVRTC nor nvcc is installed, or one refuses a target.
    """
    wanted = {KERNELS_PTX: PTX} | {kernels_for(target): f"sm_{target.removeprefix('sm')}" for target in targets}
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import _child; _child(sys.argv[1:])"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", code, folder, *wanted.values()]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode == REFUSED:
            raise DeployError(done.stderr.strip())
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise DeployError(f"the compiler of the GPU kernels broke off (exit code {done.returncode}): {last[:200]}")
        found = {name: (Path(folder) / architecture).read_bytes() for name, architecture in wanted.items()}
        return found | {KERNELS_PTX: _for_older_drivers(found[KERNELS_PTX])}


def _for_older_drivers(ptx: bytes) -> bytes:
    """PTX that declares PTX_VERSION, where its compiler declared a newer one."""

    def lowered(found: re.Match[bytes]) -> bytes:
        versions = [tuple(map(int, text.split("."))) for text in (found[1].decode(), PTX_VERSION)]
        return b".version " + (found[1] if versions[0] <= versions[1] else PTX_VERSION.encode())

    return re.sub(rb"^\.version (\d+\.\d+)", lowered, ptx, count=1, flags=re.MULTILINE)


def check_compiler() -> None:
    """Raises DeployError where there is neither NVRTC nor nvcc, as far as can be told without loading one."""
    spec = find_spec("nvidia")
    folders = (spec.submodule_search_locations if spec else None) or ()
    wheel = any(next(Path(folder).glob("*/lib/libnvrtc.so.[0-9]*"), None) for folder in folders)
    if not wheel and shutil.which("nvcc") is None and find_library("nvrtc") is None:
        raise _no_compiler()


def _no_compiler() -> DeployError:
    return DeployError(
        "the GPU kernels cannot be compiled, as NVRTC and nvcc are missing; run: pip install nvidia-cuda-nvrtc"
    )


def _child(words: Sequence[str]) -> None:
    """Compile for architectures into a folder, a file each."""
    folder, *architectures = words
    try:
        compiler = _nvrtc() or _nvcc()
        if compiler is None:
            raise _no_compiler()
        for architecture in architectures:
            (Path(folder) / architecture).write_bytes(compiler(architecture))
    except DeployError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)


def _nvrtc():
    """A compiler by NVRTC (a wheel, or a toolkit's library): architecture → code. None where there is none."""
    spec = find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    files = [file for folder in folders for file in folder.glob("*/lib/libnvrtc.so.[0-9]*")]
    files.sort(key=lambda file: [int(part) for part in re.findall(r"\d+", file.name)])  # the newest knows most GPUs
    library = None
    for name in [*(str(file) for file in files[-1:]), "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]:
        try:
            library = ctypes.CDLL(name)
            break
        except OSError:
            continue
    if library is None:
        return None
    library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def compile(architecture: str) -> bytes:
        program, options = ctypes.c_void_p(), [f"--gpu-architecture={architecture}", *OPTIONS]
        library.nvrtcCreateProgram(ctypes.byref(program), SOURCE.read_bytes(), SOURCE.name.encode(), 0, None, None)
        try:
            values = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            if code := library.nvrtcCompileProgram(program, len(options), values):
                reason = _nvrtc_text(library, program, "ProgramLog") or library.nvrtcGetErrorString(code)
                raise _refusal("NVRTC", architecture, reason.decode(errors="replace"))
            return _nvrtc_text(library, program, "PTX" if architecture == PTX else "CUBIN")
        finally:
            library.nvrtcDestroyProgram(ctypes.byref(program))

    return compile


def _nvrtc_text(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(max(size.value, 1))
    getattr(library, f"nvrtcGet{what}")(program, buffer)
    text = buffer.raw[: size.value]
    return text if what == "CUBIN" else text.rstrip(b"\0")


def _nvcc():
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None

    def compile(architecture: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "kernels"
            kind = "-ptx" if architecture == PTX else "-cubin"
            command = [nvcc, kind, f"-arch={architecture}", *OPTIONS, "-o", str(out), str(SOURCE)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise _refusal("nvcc", architecture, done.stderr or done.stdout)
            return out.read_bytes()

    return compile


def _refusal(compiler: str, architecture: str, reason: str) -> DeployError:
    return DeployError(
        f"{compiler} cannot compile the GPU kernels for {architecture}: {' '.join(reason.split())[:300]}; "
        "is this compiler too old or too new for that GPU?"
    )
