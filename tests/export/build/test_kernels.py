"""The runtime's CUDA kernels, compiled ahead."""

import re
import shutil
import subprocess

import pytest
from fcn_deploy.export.build.targets import kernels
from fcn_deploy.runtime.backends import KERNELS_PTX, kernels_for

from fcn_deploy import DeployError

needs_compiler = pytest.mark.skipif(
    kernels._nvcc() is None and kernels.find_spec("nvidia") is None,
    reason="NVRTC and nvcc are missing; pip install nvidia-cuda-nvrtc",
)


@needs_compiler
def test_machine_code_for_the_gpus_named_and_ptx_for_the_others():
    members = kernels.compile_kernels(["sm86", "sm120"])
    assert list(members) == [KERNELS_PTX, kernels_for("sm86"), kernels_for("sm120")]
    assert b".target sm_75" in members[KERNELS_PTX]
    for name in (
        "prepare_uint8_float32",
        "prepare_int16_float32",
        "prepare_float32_float16",
        "label_float16_uint8",
        "label_float32_uint16",
    ):
        assert f".entry {name}(".encode() in members[KERNELS_PTX]
        assert name.encode() in members[kernels_for("sm86")]
    # Products are rounded before they are added: no fused multiply-add of float32.
    assert b"fma.rn.f32" not in members[KERNELS_PTX] and b"mul.rn.f32" in members[KERNELS_PTX]
    assert members[kernels_for("sm86")][:4] == b"\x7fELF"


@needs_compiler
def test_no_pixel_is_computed_in_float64():
    ptx = kernels.compile_kernels([])[KERNELS_PTX].decode()
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)\n}", ptx, re.DOTALL))
    assert len(bodies) == 13
    assert [name for name, body in bodies.items() if ".f64" in body] == ["positions"]  # of rows and columns


@needs_compiler
@pytest.mark.skipif(shutil.which("ptxas") is None, reason="ptxas is missing; install the CUDA toolkit")
def test_the_ptx_is_what_the_version_it_declares_has(tmp_path):
    ptx = kernels.compile_kernels([])[KERNELS_PTX]
    assert b".version 8.0\n" in ptx  # drivers of CUDA 12.0 and newer
    (tmp_path / "kernels.ptx").write_bytes(ptx)
    for target in ("sm_75", "sm_90", "sm_120"):
        words = ["ptxas", f"-arch={target}", "-v", tmp_path / "kernels.ptx", "-o", tmp_path / "kernels.cubin"]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0 and " 0 bytes spill stores" in done.stderr, done.stderr
        assert not re.search(r"[1-9]\d* bytes spill", done.stderr)


@needs_compiler
def test_a_gpu_that_the_compiler_does_not_know_is_named():
    with pytest.raises(DeployError, match=r"cannot compile the GPU kernels for sm_12: .*too old or too new"):
        kernels.compile_kernels(["sm12"])


def test_a_compiler_that_breaks_off_is_one_line(monkeypatch):
    dead = subprocess.CompletedProcess([], -11, "", "Fatal error\nSegmentation fault\n")
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: dead)
    with pytest.raises(DeployError, match=r"broke off \(exit code -11\): Segmentation fault"):
        kernels.compile_kernels([])


def test_no_compiler_names_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(kernels, "_nvrtc", lambda: None)
    monkeypatch.setattr(kernels, "_nvcc", lambda: None)
    with pytest.raises(SystemExit) as ended:
        kernels._child([str(tmp_path), kernels.PTX])
    assert ended.value.code == kernels.REFUSED and "pip install nvidia-cuda-nvrtc" in capsys.readouterr().err
