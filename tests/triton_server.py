"""A real tritonserver for tests: from the wheel of nvidia-pytriton, which has it with the Python backend alone.

It is fetched once (55 MB, 144 MB unpacked), with a NumPy that it can read (18 MB).
"""

import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from fetched import unpacked

SERVER, NUMPY = "nvidia-pytriton==0.7.0", "numpy==1.26.4"
PURELIB = Path(sysconfig.get_path("purelib"))


def server_folder() -> Path:
    """Of tritonserver, with the stub of this Python in its place; the test skips where it cannot run."""
    version = "{}.{}".format(*sys.version_info)
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("tritonserver's wheel is for Linux on x86_64 only")
    folder = unpacked(SERVER) / "pytriton" / "tritonserver"
    stub = folder / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        pytest.skip(f"tritonserver's wheel has no stub of Python {version}")
    placed = folder / "backends" / "python" / stub.name
    if not placed.exists() or placed.read_bytes() != stub.read_bytes():  # of another Python
        new = placed.with_name(f"{stub.name}-{os.getpid()}")
        shutil.copy(stub, new)
        new.replace(placed)
    for program in (placed, folder / "bin" / "tritonserver"):
        program.chmod(0o755)
        found = subprocess.run(["ldd", program], capture_output=True, text=True, env=environment()).stdout
        if missing := [line.strip() for line in found.splitlines() if "not found" in line]:
            pytest.skip(f"tritonserver does not run here: {missing[0]}")
    return folder


def environment() -> dict[str, str]:
    """Where this Python's library is, which the stub needs."""
    paths = [sysconfig.get_config_var("LIBDIR") or "", os.environ.get("LD_LIBRARY_PATH", "")]
    return os.environ | {"LD_LIBRARY_PATH": ":".join(filter(None, paths))}


def site_with_old_numpy(folder: Path) -> Path:
    """A folder of packages: NumPy 1.26 before what this Python has."""
    numpy = unpacked(NUMPY)
    folder.mkdir()
    for part in numpy.iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "rest.pth").write_text(f"import site; site.addsitedir({str(PURELIB)!r})\n")
    return folder


@contextmanager
def running(models: Path, log: Path, *words: str):
    """A server of the repository `models`, ready; its HTTP and gRPC addresses. Fails with its log."""
    folder = server_folder()
    ports = [_free_port() for _ in range(3)]
    addresses = [f"127.0.0.1:{port}" for port in ports[:2]]
    named = zip(("http", "grpc", "metrics"), ports, strict=True)
    with log.open("w") as out:
        process = subprocess.Popen(
            [
                folder / "bin" / "tritonserver", f"--model-repository={models}",
                f"--backend-directory={folder / 'backends'}", "--http-address=127.0.0.1", "--grpc-address=127.0.0.1",
                *(f"--{name}-port={port}" for name, port in named), *words,
            ], stdout=out, stderr=subprocess.STDOUT, env=environment(), start_new_session=True,
        )  # fmt: skip
    try:
        while process.poll() is None and not _ready(addresses[0]):
            time.sleep(0.1)
        if process.poll() is not None:
            raise ChildProcessError(log.read_text())
        yield addresses
    finally:
        process.terminate()
        process.wait(60)


def _ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/v2/health/ready", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
