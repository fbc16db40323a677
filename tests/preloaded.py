"""Programs that take seconds to load PyTorch and onnx, run in forks of one process that has loaded them already.

They are the installed scripts and modules as they are, each in a process of its own that ends as any other does; only
what a fork shares with its parent is not loaded again. What is tested of the loading itself runs elsewhere.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Sequence
from pathlib import Path

# None that starts a thread, which a fork would lack: not onnxruntime, openvino, scikit-learn.
LOADED = (
    "torch", "torch._dynamo", "onnx", "onnxscript", "safetensors.torch", "PIL.Image", "rich.progress", "typer",
    "fcn_deploy.export.cli.build_engine", "fcn_deploy.export.build.engine", "fcn_deploy.export.from_torch",
    "fcn_deploy.fcn.cli.train_fcn", "fcn_deploy.fcn.train",
)  # fmt: skip
SMALL_SIZES = ((64, 64), (96, 128))  # in the place of those that are measured where no others are named
_one_at_a_time = threading.Lock()


@functools.cache
def _parent() -> subprocess.Popen:
    """The process that is forked: it takes a line of JSON for each program, and answers with its exit code."""
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # libraries may start more as they are loaded, which no fork has
    words = [sys.executable, __file__]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=one_thread)


def run(program: Sequence[str], cwd: Path | None = None, measured: bool = False) -> subprocess.CompletedProcess:
    """Run `[script, *arguments]` or `["-m", module, *arguments]` of Python to its end.

    `measured`: commands measure for as long as they do for their users; otherwise see `_measure_little`.
    """
    with tempfile.TemporaryDirectory() as folder, _one_at_a_time:
        out, err = Path(folder, "out"), Path(folder, "err")
        job = {"program": [*program], "out": str(out), "err": str(err), "cwd": str(cwd or Path.cwd())}
        job |= {"measured": measured, "env": dict(os.environ)}
        parent = _parent()
        print(json.dumps(job), file=parent.stdin, flush=True)
        code = parent.stdout.readline()
        assert code, "the process that is forked has ended"
        return subprocess.CompletedProcess(program, int(code), out.read_text("utf-8"), err.read_text("utf-8"))


def _become(job: dict) -> None:
    """In a fork: the program, with its files, folder and environment."""
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, job["out"], os.O_WRONLY | os.O_CREAT),
        (2, job["err"], os.O_WRONLY | os.O_CREAT),
    ):
        given = os.open(path, flags)
        os.dup2(given, number)
        os.close(given)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    first, *rest = job["program"]
    if first == "-m":
        sys.argv, sys.path[0] = rest, job["cwd"]
        # As multiprocessing, which is loaded, knows it: what processes of its own send back is found there.
        sys.modules["__main__"] = sys.modules["__mp_main__"] = types.ModuleType("__main__")
        runpy._run_module_as_main(rest[0])  # what `python -m` does
    else:
        sys.argv, sys.path[0] = [first, *rest], str(Path(first).parent)
        if not job["measured"]:
            _measure_little(Path(first).name)
        runpy.run_path(first, run_name="__main__")


def _measure_little(name: str) -> None:
    """What a command measures, it measures in small images: of networks as small as the tests' it is mostly chance."""
    if name == "verify-engine":
        from fcn_deploy.runtime import latency

        latency.TIMED_SIZES = SMALL_SIZES
    if name == "build-engine":
        from fcn_deploy.export.build import measured_memory
        from fcn_deploy.export.build.targets import cpu

        measured_memory.SIDES = measured_memory.SIDES[:3]
        cpu.TIMED_SIZES, cpu.TILED_SIZE = SMALL_SIZES, SMALL_SIZES[0]


def _in_fork(job: dict) -> None:
    """The program, to its end: what is loaded is left as it is, as taking it down takes longer than most programs."""
    code = 1
    try:
        _become(job)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve() -> None:
    for name in LOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert len([*Path("/proc/self/task").iterdir()]) == 1
    gc.freeze()  # or every fork would copy what its first collection looks at
    while line := sys.stdin.readline():
        job = json.loads(line)
        child = os.fork()
        if not child:
            _in_fork(job)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
