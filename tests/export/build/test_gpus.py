"""What a target may be called, and what is said of GPUs that other ways serve."""

import json
import platform

import pytest
from fcn_deploy.export.build import gpus
from fcn_deploy.export.build.config import BuildConfig
from fcn_deploy.export.build.gpus import capability, parse_targets
from fcn_deploy.export.build.targets.tensorrt import kernels
from fcn_deploy.export.build.targets.tensorrt import plan as tensorrt_plan
from fcn_deploy.export.build.targets.tensorrt import process as tensorrt_process
from fcn_deploy.export.quantization.options import QuantizationOptions
from helpers import command, one_error, save_photos

from fcn_deploy import DeployError, MisuseError


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("rtx4090", "sm89"), ("RTX 4090", "sm89"), ("NVIDIA GeForce RTX 3060 Ti", "sm86"), ("rtx2080ti", "sm75"),
        ("T4", "sm75"), ("a100", "sm80"), ("A10G", "sm86"), ("rtx-a6000", "sm86"), ("l4", "sm89"), ("L40S", "sm89"),
        ("RTX 6000 Ada", "sm89"), ("h100", "sm90"), ("orin", "sm87"), ("Jetson AGX Orin", "sm87"), ("b200", "sm100"),
        ("gb300", "sm103"), ("Jetson Thor", "sm110"), ("rtx5090", "sm120"), ("RTX PRO 6000", "sm120"),
        ("DGX Spark", "sm121"), ("sm89", "sm89"), ("SM120", "sm120"), ("rtx9999", "rtx9999"),
        ("8.9", "sm89"), ("12.0", "sm120"), ("8.9.1", "8.9.1"),
        # As nvidia-smi says them.
        ("Tesla T4", "sm75"), ("NVIDIA A100-SXM4-80GB", "sm80"), ("NVIDIA A100 80GB PCIe", "sm80"),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", "sm86"), ("NVIDIA RTX 4000 Ada Generation", "sm89"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "sm89"), ("NVIDIA H100 80GB HBM3", "sm90"), ("NVIDIA H200 NVL", "sm90"),
        ("NVIDIA GH200 480GB", "sm90"), ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "sm120"),
        ("NVIDIA Jetson AGX Orin Developer Kit", "sm87"), ("Jetson Orin Nano Super", "sm87"),
        ("V100", "sm70"), ("GTX 1080 Ti", "sm61"), ("Jetson Xavier NX", "sm72"), ("NVIDIA GH200 144G HBM3e", "sm90"),
        ("NVIDIA GeForce GTX 1650 with Max-Q Design", "sm75"), ("NVIDIA RTX 4000 SFF Ada Generation", "sm89"),
        ("NVIDIA A800 40GB Active", "sm80"), ("Quadro T2000", "sm75"), ("NVIDIA B300 SXM6 AC", "sm103"),
        ("RTX PRO 4000 Blackwell SFF Edition", "sm120"), ("Quadro GV100", "sm70"), ("Tesla K80", "sm37"),
        # As people write them.
        ("a6000", "sm86"), ("jetson-orin-nano", "sm87"), ("thor", "sm110"), ("Jetson T5000", "sm110"),
        ("GB200 NVL72", "sm100"), ("DGX H100", "sm90"), ("rtx pro 6000", "sm120"), ("Vera Rubin", "sm107"),
        ("rtx6000", "rtx6000"),  # of Turing or Ada
        ("4090", "sm89"), ("3060 ti", "sm86"), ("RTX 8000", "sm75"), ("sm_89", "sm89"), ("sm90a", "sm90"),
        ("GRID T4-16Q", "sm75"), ("NVIDIA A40-48Q", "sm86"), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "sm80"),
        ("Orin (nvgpu)", "sm87"), ("NVIDIA RTX 2000E Ada Generation", "sm89"), ("CPU", "cpu"), ("Ort-CUDA", "ort-cuda"),
    ],
)  # fmt: skip
def test_names_that_people_know_are_compute_capabilities(name, found):
    assert capability(name) == found


def test_names_and_capabilities_are_one_target_each():
    assert parse_targets("rtx4090,sm89,l4, RTX 3090") == ["sm89", "sm86"]
    assert BuildConfig(target="rtx4090,rtx5090").target == "sm89,sm120"
    assert parse_targets("cuda, CUDA") == ["cuda"] and BuildConfig(target="CPU").on_cpu


def test_a_target_is_read_in_any_case_before_options_are_held_against_it():
    from fcn_deploy.export.cli.build_engine import TargetOptions, _spelled

    assert [_spelled(TargetOptions(name)).target for name in ("CPU", "Cuda", "RTX 4090")] == ["cpu", "cuda", "RTX 4090"]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (
            "h100",
            r"'h100': sm90 \(H100, H200 and GH200\) is served by .* --target cuda, or use --target ort",
        ),
        ("orin", r"sm87 \(Jetson Orin; JetPack 6 has 10.7 at most\) is served by TensorRT 10.12 or later, .* cpu$"),
        (
            "vera rubin",
            r"sm107 \(Vera Rubin\) is served by TensorRT 11.3 or later, .* with --target cuda, or use --target ort",
        ),
        ("k80", "before sm75 .* use --target cpu"),
        ("thor", r"sm110 \(Jetson Thor\) .* with --target cuda, or use --target cpu$"),
        ("v100", "'v100': no library here has plans for GPUs before sm75"),
        ("gtx1080", "before sm75 .* use --target cpu"),
        ("Windows", "'Windows' is no GPU; name its GPU, such as rtx4090: .* run on Windows too"),
        ("jetson", "build on the Jetson with --target cuda"),
        ("aarch64", "is no GPU; a plan is of the kind of processor that built it: build on the Arm machine"),
        ("sm89,b200", r"'b200': sm100"),
        ("sm61", "no library here has plans for GPUs before sm75"),
        ("rtx9000x", "choose cpu, cuda .* ort-cuda.* GPUs by name, such as rtx4090.* nvidia-smi --query-gpu"),
        ("rtx 6000", r"GPUs of two generations: say sm75 \(Quadro RTX\) or sm89 \(RTX … Ada\); nvidia-smi"),
        ("ort-cuda,sm89", "'ort-cuda,sm89': ort-cuda stands alone, not in a list"),
        ("sm89,", "target ''; choose cpu"),
    ],
)
def test_a_target_that_is_refused_says_which_way_serves_it(target, said):
    with pytest.raises(MisuseError, match=said) as caught:
        parse_targets(target)
    assert len(str(caught.value)) <= 300


def test_plans_for_arm_machines_are_built_on_arm_machines(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with pytest.raises(MisuseError, match=r"'gb10': sm121 \(GB10, DGX Spark\) is in Arm machines"):
        parse_targets("gb10")
    monkeypatch.setattr(gpus.platform, "machine", lambda: "aarch64")
    assert parse_targets("gb10") == ["sm121"]


@pytest.mark.parametrize("target", ["sm75", "sm75,sm89", "t4"])
def test_int8_is_refused_where_no_convolution_would_be_int8(target):
    with pytest.raises(MisuseError, match=r"--int8 is refused for sm75: .*use --fp16, or build sm75 apart"):
        BuildConfig(target=target, quantization=QuantizationOptions(int8=True, calib="photos"))
    BuildConfig(target=target, quantization=QuantizationOptions(fp16=True, calib="photos"))


@pytest.mark.parametrize(
    ("name", "target", "said"),
    [
        ("fp8", "sm86,sm89", "--fp8 is refused for sm86: GPUs before sm89 have no FP8 arithmetic; use --fp16"),
        ("bf16", "t4", "--bf16 is refused for sm75: GPUs before sm80 have no BF16"),
        ("fp8", "cpu", "--fp8 is for TensorRT's plans, not for --target cpu: name GPUs"),
        ("fp8", "ort-cuda", "--fp8 is for TensorRT's plans, not for --target ort-cuda"),
    ],
)
def test_types_that_a_gpu_lacks_are_refused(name, target, said):
    with pytest.raises(MisuseError, match=said):
        BuildConfig(target=target, quantization=QuantizationOptions(**{name: True}, calib="photos"))
    BuildConfig(target="rtx4090", quantization=QuantizationOptions(**{name: True}, calib="photos"))


def test_types_that_this_machines_gpu_lacks_are_refused_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt_process, "choose_module", lambda targets: (None, ("sm80",)))
    monkeypatch.setattr(tensorrt_process.os, "_exit", lambda code: None)
    for types, said in (([], ""), (["bf16"], ""), (["bf16", "fp8"], "--fp8 is refused for sm80")):
        (tmp_path / "types.json").write_text(json.dumps(types))
        tensorrt_process.run_check(str(tmp_path))
        told = json.loads((tmp_path / "said.json").read_text())
        assert told.startswith(said) and bool(told) == bool(said)


def test_what_is_missing_is_said_before_calibration(exports, tmp_path, monkeypatch):
    from fcn_deploy.export.build import engine
    from fcn_deploy.export.importer.import_model import import_model

    def never(*words, **options):
        raise AssertionError("the core was quantized first")

    monkeypatch.setattr(engine, "mixed_as_asked", never)
    model, out = import_model(exports / "narrow.onnx"), tmp_path / "m.engine"
    monkeypatch.setattr(tensorrt_plan, "find_spec", lambda name: None)
    monkeypatch.setattr(tensorrt_plan, "need", _absent)
    with pytest.raises(DeployError, match="tensorrt_rtx is absent"):
        engine.build_engine(model, out, BuildConfig(target="sm89"))
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    monkeypatch.setattr(kernels, "find_library", lambda name: None)
    with pytest.raises(DeployError, match="NVRTC and nvcc are missing; run: pip install nvidia-cuda-nvrtc"):
        engine.build_engine(model, out, BuildConfig(target="sm89"))


def _absent(module, extra):
    raise DeployError(f"{module} is absent")


def test_the_gpu_of_this_machine_is_asked_for_first(monkeypatch):
    if tensorrt_process.local_device() is not None:
        pytest.skip("this machine has a GPU, or a simulated one")
    with pytest.raises(DeployError, match="--target cuda is the GPU of this machine, and none can be used"):
        tensorrt_plan.check_builder(BuildConfig(target="cuda").tensorrt_options)


@pytest.mark.parametrize("found", [(7, 0), (6, 1)])
def test_a_gpu_of_this_machine_that_no_library_serves_is_said_before_anything_is_built(monkeypatch, found):
    """TensorRT for RTX would be told to build for the current GPU, whichever it is."""
    monkeypatch.setattr(tensorrt_process, "local_device", lambda: found)
    said = r"the GPU of this machine is sm\d\d: no library here has plans for GPUs before sm75 .*; use --target cpu"
    with pytest.raises(DeployError, match=said):
        tensorrt_process.choose_module(("cuda",))


@pytest.mark.slow
def test_the_photographs_of_sizes_serve_fp16_and_sizes_alone_say_what_was_not_seen(exports, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is missing; pip install 'fcn-deploy[rtx]'")
    save_photos(tmp_path / "photos", [(70, 90), (64, 96), (80, 80)])
    words = ("build-engine", exports / "narrow.onnx", "--fp16", "--target", "rtx4090", "--max-drop", "100")
    done = command(*words, "--sizes", tmp_path / "photos", "-o", tmp_path / "a.engine")
    assert "for sm89, float16" in done.stdout and "calibrated on 2 images" in done.stdout
    done = command(*words, "--sizes", "64x96", "-o", tmp_path / "b.engine")
    assert "what overflows was looked for in the golden sample alone" in done.stdout + done.stderr
    assert "a plan in float32" not in done.stdout
    done = command(words[0], words[1], "--target", "sm75,sm89", "--sizes", "64x96", "-o", tmp_path / "d.engine")
    assert "a plan in float32: --fp16, with --calib or --sizes FOLDER, builds one of half the" in done.stdout
    assert "in a plan with sm75 every GPU multiplies eight times as much" in done.stdout + done.stderr
    done = command(
        "build-engine", exports / "narrow.onnx", "--fp16", "--target", "sm89", "-o", tmp_path / "c.engine", ok=2
    )
    assert "--fp16 needs real images to find what overflows: pass --calib FOLDER (or --sizes)" in one_error(done)
