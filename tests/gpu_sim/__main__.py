"""`PYTHONPATH=tests python -m gpu_sim runtime.infer ARGS…`: run a module as __main__ on the simulated GPU.

Plans are found where FCN_GPU_SIM_PLANS says, kernels in runtime/backends/tensorrt/*.cu. Misuse fails the run.
"""

import runpy
import sys
from pathlib import Path

import gpu_sim

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python -m gpu_sim MODULE ARGS...")
    gpu_sim.install()
    if sources := sorted((ROOT / "runtime" / "backends" / "tensorrt").glob("*.cu")):
        gpu_sim.load_kernels(*sources)
    sys.argv = sys.argv[1:]
    try:
        with gpu_sim.tensorrt("tensorrt"), gpu_sim.tensorrt("tensorrt_rtx"):
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    finally:
        gpu_sim.drain()
        if wrong := gpu_sim.misuse():
            sys.exit("\n".join(f"gpu_sim: {line}" for line in wrong))


if __name__ == "__main__":
    main()
