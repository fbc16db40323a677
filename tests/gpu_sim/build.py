"""Builds what the GPU simulation needs: its libcuda.so.1, the kernels for the host, and pycuda linked to it.

`python tests/gpu_sim/build.py` does it all, once; a machine that lacks a part is told which, in one line.
"""

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = Path(sys.prefix) / "gpu_sim"
# pycuda is kept outside the environment too: it compiles for a minute or two, the same in every environment.
WHEELS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fcn-deploy-gpu-sim"
PYCUDA = "pycuda==2026.1"
# cuda.h, the headers it includes, and cudaProfiler.h. One version, so that the driver's signatures are checked
# against the same declarations everywhere.
HEADERS = ("nvidia-cuda-runtime==13.0.*", "nvidia-cuda-crt==13.0.*", "nvidia-cuda-profiler-api==13.0.*")
OLDEST = 13000  # CUDA_VERSION of headers taken from an installed toolkit instead
REMEDY = "run: python tests/gpu_sim/build.py"


class MissingError(RuntimeError):
    """A part that this machine lacks, with the remedy."""


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if not found:
        raise MissingError("a C++17 compiler is missing; install g++, or name one in CXX")
    return found


def driver() -> Path:
    """The simulated libcuda.so.1, compiled when it is not in the cache. Raises MissingError."""
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-deprecated-declarations"]
    flags += ["-Wl,-soname,libcuda.so.1", "-ldl", "-lpthread"]
    sources = [HERE / "driver.cpp", HERE / "host_kernels.h"]

    def make(folder: Path) -> None:
        compile_cpp([str(sources[0]), f"-I{headers()}", *flags], folder / "libcuda.so.1")
        (folder / "libcuda.so").symlink_to("libcuda.so.1")  # the name that -lcuda looks for

    return cached("driver", [*(file.read_bytes() for file in sources), repr(flags).encode()], make) / "libcuda.so.1"


def kernels(sources: list[Path], contract: str = "off") -> Path:
    """The kernels of CUDA files, as a library for the host.

    Args:
        sources: .cu files with `__global__` functions.
        contract: whether a * b + c may be rounded once: `off`, or `fast` as the device's compiler does by default.
    """
    flags = ["-std=c++17", "-O2", "-fno-fast-math", f"-ffp-contract={contract}", "-fPIC", "-shared", "-w"]
    if contract != "off":
        flags.append("-march=native")  # without fused instructions there is nothing to contract to
    texts = [source.read_text() for source in sources]

    def make(folder: Path) -> None:
        (folder / "cuda_fp16.h").touch()  # the shim has it already
        lines = [f'#include "{HERE / "host_kernels.h"}"']
        for source, text in zip(sources, texts, strict=True):
            names = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\(", text)
            lines += [f'#include "{source.resolve()}"', *(f"GPUSIM_KERNEL({name})" for name in names)]
        (folder / "kernels.cpp").write_text("\n".join(lines) + "\n")
        compile_cpp([str(folder / "kernels.cpp"), f"-I{folder}", *flags], folder / "kernels.so")

    parts = [(HERE / "host_kernels.h").read_bytes(), repr(flags).encode(), *(text.encode() for text in texts)]
    return cached("kernels", parts, make) / "kernels.so"


def headers() -> Path:
    """A folder with cuda.h: from PyPI, or from an installed CUDA toolkit where PyPI is out of reach."""
    said = ""

    def make(folder: Path) -> None:
        nonlocal said
        done = pip("install", "--no-deps", "--target", str(folder), *HEADERS)
        said = done.stderr
        if not next(folder.glob("nvidia/*/include/cuda.h"), None):
            raise MissingError

    try:
        return next(cached("headers", [repr(HEADERS).encode()], make).glob("nvidia/*/include"))
    except MissingError:
        pass
    nvcc = shutil.which("nvcc")
    roots = [os.environ.get("CUDA_ROOT"), os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1]]
    for root in filter(None, roots):
        header = Path(root) / "include" / "cuda.h"
        if header.exists() and (found := re.search(r"#define CUDA_VERSION (\d+)", header.read_text())):
            if int(found[1]) >= OLDEST:
                return header.parent
            said = f"{header} is of CUDA {int(found[1]) // 1000}, older than {OLDEST // 1000}"
    reason = said.strip().splitlines()[-1:] or ["no reason given"]
    raise MissingError(
        f"cuda.h is missing ({reason[0]}); let pip reach PyPI, or set CUDA_ROOT to a CUDA {OLDEST // 1000} toolkit"
    )


def pycuda() -> None:
    """Install pycuda into this environment, from its source, linked to the simulated driver. Raises MissingError."""
    library = driver()
    wheel = next(iter(sorted(WHEELS.glob(f"{PYCUDA.replace('==', '-')}-{python_tag()}-*.whl"))), None)
    if wheel is None:
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            raise MissingError("Python.h is missing; install your system's Python development package (python3-dev)")
        wheel = compile_pycuda(library)
    done = pip("install", str(wheel))
    if done.returncode:
        raise MissingError(f"pycuda cannot be installed: {last_line(done.stderr)}")


def compile_pycuda(library: Path) -> Path:
    with tempfile.TemporaryDirectory() as folder:
        print("gpu_sim: fetching pycuda", flush=True)
        done = pip("download", "--no-deps", "--no-binary", "pycuda", "--dest", folder, PYCUDA)
        archive = next(Path(folder).glob("pycuda-*.tar.gz"), None)
        if archive is None:
            raise MissingError(f"pycuda cannot be fetched: {last_line(done.stderr)}")
        with tarfile.open(archive) as members:
            members.extractall(folder, filter="data")
        source = next(path for path in Path(folder).iterdir() if path.is_dir())
        options = {
            "CUDA_INC_DIR": [str(headers())],
            "CUDADRV_LIB_DIR": [str(library.parent)],
            "CUDA_ENABLE_CURAND": False,  # another library, which nothing here uses
            "CXXFLAGS": ["-O0", "-g0", "-w"],  # three times faster to compile, and no test waits for pycuda
            "LDFLAGS": [],
        }
        (source / "siteconf.py").write_text("".join(f"{name} = {value!r}\n" for name, value in options.items()))
        WHEELS.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, str(source)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        while True:
            print(f"gpu_sim: compiling pycuda, {time.monotonic() - start:.0f} s (about a minute)", flush=True)
            try:
                output, _ = process.communicate(timeout=15)
                break
            except subprocess.TimeoutExpired:
                continue
        built = next(Path(folder).glob("pycuda-*.whl"), None)
        if built is None:
            sys.stderr.write(output)
            raise MissingError("pycuda does not compile; its compiler's output is above")
        kept = WHEELS / built.name
        partial = kept.with_name(f"{built.name}.{os.getpid()}")
        shutil.copy(built, partial)
        partial.replace(kept)
        return kept


def have_pycuda() -> bool:
    return importlib.util.find_spec("pycuda") is not None


def python_tag() -> str:
    return f"cp{sys.version_info.major}{sys.version_info.minor}"


def pip(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", words[0], "--quiet", "--disable-pip-version-check", *words[1:]]
    return subprocess.run(command, capture_output=True, text=True)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]


def compile_cpp(words: list[str], out: Path) -> None:
    # Libraries come after what needs them, so the source is first.
    done = subprocess.run([compiler(), *words, "-o", str(out)], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise RuntimeError(f"{Path(words[0]).name} does not compile: {(errors or [done.stderr])[0]}")


def cached(name: str, parts: list[bytes], make: Callable[[Path], None]) -> Path:
    """The folder of this content in the cache; `make` fills it once, however many processes ask for it."""
    folder = CACHE / f"{name}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}"
    if folder.exists():
        return folder
    with locked(name):
        if not folder.exists():
            partial = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=CACHE))
            try:
                make(partial)
                partial.rename(folder)  # whole or not at all
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


@contextmanager
def locked(name: str) -> Iterator[None]:
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    try:
        print(f"gpu_sim: the driver, {driver()}", flush=True)
        if not have_pycuda():
            with locked("pycuda"):
                pycuda()
        print("gpu_sim: ready", flush=True)
    except (MissingError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
