"""The runtime's CUDA kernels, compiled ahead."""

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from fcn_deploy.export.build.targets.tensorrt import kernels
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
        "prepare_batch_uint8_float32",
        "prepare_batch_int16_float32",
        "prepare_batch_float32_float16",
        "best_of_cells_float32_uint8",
        "label_batch_float16_uint8",
        "label_batch_float32_uint16",
    ):
        assert f".entry {name}(".encode() in members[KERNELS_PTX]
        assert name.encode() in members[kernels_for("sm86")]
    # Products are rounded before they are added: no fused multiply-add of float32.
    assert b"fma.rn.f32" not in members[KERNELS_PTX] and b"mul.rn.f32" in members[KERNELS_PTX]
    assert members[kernels_for("sm86")][:4] == b"\x7fELF"


@needs_compiler
def test_nothing_is_computed_in_float64():
    """At 1/64 of the rate on GeForce; positions are tables, made once per size on the host."""
    ptx = kernels.compile_kernels([])[KERNELS_PTX].decode()
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)\n}", ptx, re.DOTALL))
    assert len(bodies) == 16
    assert not [name for name, body in bodies.items() if ".f64" in body]


TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "sm121")


INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);", re.MULTILINE)
# Instructions that load a constant by 0 · 0 + x.
CONSTANT = re.compile(r"R\d+, -RZ, RZ, ")


def sass_of(cubin, folder):
    """Instructions and operands of each kernel, by NVIDIA's disassembler: a toolkit's, or its wheel's."""
    folders = getattr(find_spec("nvidia"), "submodule_search_locations", None) or ()
    wheel = next((str(file) for each in folders for file in Path(each).glob("*/bin/nvdisasm")), None)
    program = shutil.which("nvdisasm") or wheel
    if program is None:
        pytest.skip("nvdisasm is missing; pip install nvidia-cuda-nvdisasm")
    (folder / "kernels.cubin").write_bytes(cubin)
    done = subprocess.run([program, "-c", "-ndf", folder / "kernels.cubin"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = re.split(r"^//-+ \.text\.(\w+) -+$", done.stdout, flags=re.MULTILINE)
    return {name: INSTRUCTION.findall(text) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


@needs_compiler
def test_machine_code_has_no_float64_no_spills_and_no_fused_sums(tmp_path):
    targets = ("sm75", "sm89", "sm120")  # others are alike, and take a compiler as long
    members = kernels.compile_kernels(targets)
    for target in targets:
        found = sass_of(members[kernels_for(target)], tmp_path)
        assert len(found) == 16 and all(len(code) > 20 for code in found.values()), target
        for name, code in found.items():
            kinds = {instruction.split(".")[0] for instruction, _ in code}
            assert not kinds & {"DADD", "DMUL", "DFMA", "DSETP", "DMNMX"}, (target, name)
            assert not [one for one, _ in code if "F64" in one], (target, name)  # conversions
            assert not kinds & {"LDL", "STL"}, (target, name)  # local memory: spills
            # A product that is added before it is rounded would make other labels than NumPy's.
            fused = [each for each in code if each[0].startswith(("FFMA", "HFMA2")) and not CONSTANT.match(each[1])]
            assert not fused, (target, name, fused[:3])
            assert ("FMUL" in kinds) == ("label" in name or "prepare" in name or "float16" in name), (target, name)


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(kernels._nvcc() is None, reason="nvcc is missing; install the CUDA toolkit")
@pytest.mark.parametrize("target", ["sm_75", "sm_90", "sm_121"])
def test_the_compiler_has_nothing_to_say(tmp_path, target):
    words = ["nvcc", "-cubin", f"-arch={target}", *kernels.OPTIONS, "-Werror", "all-warnings", "-o", tmp_path / "k"]
    done = subprocess.run([*words, kernels.SOURCE], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


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


def test_of_several_nvrtcs_the_newest_compiles(monkeypatch, tmp_path):
    """As where PyTorch brings one of CUDA 12, which knows fewer GPUs, beside that of TensorRT."""
    for folder, version in (("cu13", 13), ("cuda_nvrtc", 12)):
        (tmp_path / folder / "lib").mkdir(parents=True)
        (tmp_path / folder / "lib" / f"libnvrtc.so.{version}").touch()
    spec, tried = SimpleNamespace(submodule_search_locations=[str(tmp_path)]), []

    def load(name):
        tried.append(name)
        raise OSError(name)

    monkeypatch.setattr(kernels, "find_spec", lambda name: spec)
    monkeypatch.setattr(kernels.ctypes, "CDLL", load)
    assert kernels._nvrtc() is None and tried[0] == str(tmp_path / "cu13" / "lib" / "libnvrtc.so.13")


def test_no_compiler_names_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(kernels, "_nvrtc", lambda: None)
    monkeypatch.setattr(kernels, "_nvcc", lambda: None)
    with pytest.raises(SystemExit) as ended:
        kernels._child([str(tmp_path), kernels.PTX])
    assert ended.value.code == kernels.REFUSED and "pip install nvidia-cuda-nvrtc" in capsys.readouterr().err
