"""Servers for benchmarks/serving: ours, LitServe, and a real tritonserver. Each is a context manager.

Each has a session of its own: Linux gives sessions equal shares of the cores, so that a server with one would be ahead
of a server without wherever other programs run.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from benchmarks.serving.clients import family


@contextmanager
def serve_engine(engine: Path, *words: object):
    """The server: (HTTP address, gRPC address, process, seconds until it was ready)."""
    started = time.perf_counter()
    program = [sys.executable, "-m", "fcn_deploy.runtime.serve.command", engine, "--port", "0", "--grpc-port", "0"]
    process = subprocess.Popen(
        [*map(str, program), *map(str, words)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    try:
        found = re.search(r"http://(\S+) and, by gRPC, (\S+)", process.stdout.readline())
        assert found, "the server did not start"
        assert process.stdout.readline() == "ready\n"
        yield found[1], found[2], process, time.perf_counter() - started
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(600)


@contextmanager
def litserve(engine: Path, python: str):
    """LitServe's address, and its process; `python` is of an environment that has it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [python, "-m", "benchmarks.serving.litserve_segmenter", engine, port]
    process = subprocess.Popen([*map(str, words)], stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, "LitServe did not start"
                time.sleep(0.1)
        yield f"127.0.0.1:{port}", process.pid
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # it leaves its workers behind otherwise
        process.wait()


@contextmanager
def triton(engine: Path):
    """A tritonserver's HTTP address, and its process: of the wheel that the tests have, on a NumPy that it can read."""
    from fcn_deploy.export.triton.repository import TritonConfig, write_repository

    sys.path.append(str(Path(__file__).parents[2] / "tests"))
    import triton_server

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        site = triton_server.site_with_old_numpy(folder / "site")
        config = TritonConfig(outputs=("labels",), warmup=((480, 640),), site_packages=site)
        write_repository(engine, folder / "models", config)
        before = set(family(os.getpid()))
        with triton_server.running(folder / "models", folder / "log") as (address, _):
            yield address, min(set(family(os.getpid())) - before)  # its stub has come after it
