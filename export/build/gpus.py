"""NVIDIA's GPUs as users name them, and which library builds plans for each."""

import platform
import re

from fcn_deploy.runtime.backends import OLDEST_GPU, ORT_TARGETS, RTX_GPUS
from fcn_deploy.runtime.errors import MisuseError

CPU = "cpu"
THIS_GPU = "cuda"  # as a target: the GPU of this machine
ALONE = (CPU, *ORT_TARGETS, THIS_GPU)  # targets that are in no list
ARM_ONLY = ("sm121",)
TOO_OLD = f"no library here has plans for GPUs before {OLDEST_GPU} (RTX 20, T4); use --target {CPU}"
# The others of TensorRT, which times kernels on the GPU itself: what they are, for the refusal.
ON_THE_MACHINE = {
    "sm87": "Jetson Orin; JetPack 6 has 10.7 at most",  # TensorRT's support matrix
    "sm90": "H100, H200 and GH200",
    "sm100": "B200 and GB200",
    "sm103": "B300 and GB300",
    "sm107": "Vera Rubin",
    "sm110": "Jetson Thor",
}
_TENSORRT = {"sm107": "11.3"}  # that first has a GPU, by its release notes; of the others the oldest that is taken here
# Systems and kinds of machines, which are no GPUs: what is to be said of each.
_MACHINES = {
    "windows": "name its GPU, such as rtx4090: the plans that are built for it run on Windows too; or build with "
    f"--target {THIS_GPU} there, or with --target {THIS_GPU} --platform windows on Linux, on the same kind of GPU",
    "jetson": f"a plan is of the kind of processor that built it: build on the Jetson with --target {THIS_GPU}",
    "arm": f"a plan is of the kind of processor that built it: build on the Arm machine with --target {THIS_GPU}",
}
_MACHINE_NAMES = {"win": "windows", "win64": "windows", "aarch64": "arm", "arm64": "arm", "sbsa": "arm", "grace": "arm"}
_ASK = "nvidia-smi --query-gpu=compute_cap --format=csv tells a GPU's number"
LEAST_GPU = {"bf16": "sm80", "fp8": "sm89"}  # that has arithmetic of a type: Ampere, and Ada

# Names, without spaces, hyphens and makers, → compute capability (developer.nvidia.com/cuda-gpus, and -legacy-gpus).
_NAMES = (
    (r"k[48]0", "sm37"),
    (r"m[46]0|gtx9\d0(ti)?|gtxtitanx", "sm52"),
    (r"jetsonnano|(jetson)?tx1", "sm53"),
    (r"p100|quadrogp100", "sm60"),
    (r"gtx10[1-8]0(ti)?|titanxp?|p4|p40|quadrop\d+", "sm61"),
    (r"(jetson)?tx2", "sm62"),
    (r"v100s?|titanv|(quadro)?gv100", "sm70"),
    (r"(jetson)?(agx)?xavier(nx|agx)?", "sm72"),
    (r"(rtx)?20[678]0(ti|super)?|(gtx)?16[356]0(ti|super)?|mx[45]50|t4|t4g|(quadro)?(t[456]00|t1[02]00|t550|t2000)|"
     r"titanrtx|quadrortx\d000|rtx8000", "sm75"),
    (r"a100x?|a30x?|a800", "sm80"),
    (r"rtx2050|(rtx)?30[5-9]0(ti|super)?|mx570|a2|a10[gm]?|a16|a40|(rtx)?a[1-6][05]00|rtxa\d{3,4}", "sm86"),
    (r"(jetson)?(agx)?orin(nano|nx|agx)?(super)?", "sm87"),
    (r"(rtx)?40[5-9]0(ti|super|tisuper|d)?|l2|l4|l20|l40[sg]?|(rtx)?\d{3,4}e?ada", "sm89"),
    (r"h100|h200|h800|h20(3e)?|gh200", "sm90"),
    (r"b100|b200|gb200", "sm100"),
    (r"b300|gb300", "sm103"),
    (r"(vera)?rubin|vr200", "sm107"),
    (r"(jetson)?(agx)?thor(t[45]000)?|jetsont[45]000", "sm110"),
    (r"(rtx)?50[5-9]0(ti|super|tisuper|d)?(v2)?|rtxpro\d{3,4}d?(blackwell)?|rtx6000pro", "sm120"),
    (r"gb10|spark", "sm121"),
)  # fmt: skip
_AMBIGUOUS = re.compile(r"rtx[456]000")  # Quadro of Turing, and without its word of Ada, too
# What nvidia-smi says around the name: makers, editions, slots and memory, shares of a GPU; and names of machines.
_AROUND = re.compile(
    r"-\d{1,2}[abcq]\b|\bmig\b.*|\(nvgpu\)|grid|nvidia|geforce|tesla|hgx|dgx|generation|laptop|gpu|workstation|server|desktop|edition|active|"
    r"(with)?[\s_-]*max[\s_-]*q([\s_-]*design)?|developer[\s_-]*kit|module|pcie|nvl\d*|sxm\d?([\s_-]*ac\b)?|hbm\d?e?|sff|"
    r"\d+gb|\b\d+g\b|[\s_-]"
)


def capability(name: str) -> str:
    """A target as the user says it, as `sm89` where it is a GPU's name, such as `RTX 4090`, or `8.9`."""
    if number := re.fullmatch(r"\s*(\d{1,2})\.(\d)\s*", name):  # as nvidia-smi tells it
        return f"sm{number[1]}{number[2]}"
    if name.strip().lower() in ALONE:
        return name.strip().lower()
    said = re.sub(r"^(sm\d+)[af]$", r"\1", _AROUND.sub("", name.lower()))  # sm90a: of one architecture, or family
    return next((found for pattern, found in _NAMES if re.fullmatch(pattern, said)), said)


def parse_targets(text: str) -> list[str]:
    """`sm86,rtx4090` or `cuda` as a list of compute capabilities, without repetitions.

    Raises:
        MisuseError: no such GPU, or one that plans are not built for here, with the way that serves it.
    """
    targets = {capability(name): name.strip() for name in reversed(text.split(","))}
    found = list(dict.fromkeys(capability(name) for name in text.split(",")))
    if len(found) > 1 and (alone := [target for target in found if target in ALONE]):
        raise MisuseError(f"target {text!r}: {alone[0]} stands alone, not in a list; build an engine for each")
    for target in found:
        if target not in (*RTX_GPUS, THIS_GPU):
            raise MisuseError(_refusal(target, targets[target]))
        if target in ARM_ONLY and platform.machine().lower() not in ("aarch64", "arm64"):
            raise MisuseError(
                f"target {targets[target]!r}: {target} (GB10, DGX Spark) is in Arm machines, and a plan is of the "
                f"kind of processor that built it: build there with --target {THIS_GPU}, or use --target {CPU}"
            )
    return found


def check_type(name: str, target: str) -> None:
    """Refuse a type of LEAST_GPU that the target's GPU has no arithmetic of. Raises MisuseError.

    Args:
        name: a key of LEAST_GPU.
        target: a compute capability, or THIS_GPU, which is asked where it is.
    """
    least = LEAST_GPU[name]
    if target != THIS_GPU and int(target[2:]) < int(least[2:]):
        raise MisuseError(
            f"--{name} is refused for {target}: GPUs before {least} have no {name.upper()} arithmetic; use --fp16, or "
            f"name {least} or newer alone"
        )


def _refusal(target: str, said: str) -> str:
    if machine := _MACHINES.get(_MACHINE_NAMES.get(target, target)):
        return f"target {said!r} is no GPU; {machine}"
    if target in ON_THE_MACHINE:
        # There is no onnxruntime-gpu for Arm.
        other = CPU if "Jetson" in ON_THE_MACHINE[target] else "ort-cuda"
        return (
            f"target {said!r}: {target} ({ON_THE_MACHINE[target]}) is served by TensorRT "
            f"{_TENSORRT.get(target, '10.12')} or later, which builds on the GPU itself: run "
            f"build-engine there with --target {THIS_GPU}, or use --target {other}"
        )
    older = re.fullmatch(r"sm(\d\d)", target)
    if older and int(older[1]) < int(OLDEST_GPU[2:]):
        return f"target {said!r}: {TOO_OLD}"
    if _AMBIGUOUS.fullmatch(target):
        return (
            f"target {said!r} is the name of GPUs of two generations: say sm75 (Quadro RTX) or sm89 (RTX … Ada); {_ASK}"
        )
    return (
        f"target {said!r}; choose {CPU}, {THIS_GPU} (the GPU of this machine), {', '.join(ORT_TARGETS)}, or one or "
        f"more of {','.join(RTX_GPUS)} or GPUs by name, such as rtx4090,l4; {_ASK}"
    )
