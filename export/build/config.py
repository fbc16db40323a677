"""What an engine is built for, and how: everything that the caller says, checked before anything is done."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from fcn_deploy.export.build.gpus import ALONE, CPU, LEAST_GPU, THIS_GPU, capability, check_type, parse_targets
from fcn_deploy.export.build.targets.tensorrt.profiles import check_profile_options
from fcn_deploy.export.quantization.options import QuantizationOptions
from fcn_deploy.runtime.backends import CPU_BACKENDS, ORT_TARGETS
from fcn_deploy.runtime.backends.openvino import installed
from fcn_deploy.runtime.backends.tensorrt.device import platform_name
from fcn_deploy.runtime.errors import DeployError, MisuseError
from fcn_deploy.runtime.sizes import Size, Sizes

HARDWARE_LEVELS = {
    "none": "NONE",
    "ampere+": "AMPERE_PLUS",
    "same-compute-capability": "SAME_COMPUTE_CAPABILITY",
}  # as the user says it → TensorRT's name
PLATFORMS = {"windows": "windows-x86_64"}  # as the user says it → as manifests have it
BUILDS_FOR_WINDOWS = "linux-x86_64"  # the one platform on which TensorRT does
DEFAULT_BATCH = 4  # images at once, of TensorRT's profiles
TUNING_SECONDS = 20.0
# Five stages cost an image that is run whole 4 to 11 % of its time (docs/results/huge-images.md); two cost none that
# can be measured, and save most of the work that halos are.
DEFAULT_STAGES = 2


def backends_of(name: str) -> tuple[str, ...]:
    """The backends that `--backend` allows: `auto` is every one that is installed. Raises MisuseError, DeployError."""
    if name == "auto":
        return tuple(backend for backend in CPU_BACKENDS if backend != "openvino" or installed())
    if name not in CPU_BACKENDS:
        raise MisuseError(f"backend {name!r}; choose auto, {' or '.join(CPU_BACKENDS)}")
    if name == "openvino" and not installed():
        raise DeployError("openvino is not installed; run: pip install 'fcn-deploy[openvino]'")
    return (name,)


@dataclass(frozen=True)
class TuningOptions:
    """What may be chosen among for a CPU.

    Attributes:
        backends: of CPU_BACKENDS, the preferred first.
        fewer_threads: try fewer than one per physical core too, for the report.
        seconds: of measuring, at most, but for first runs.
        stages: that the core is cut into, at most.
        fine: cut it further once more, for images that memory does not hold alone.
    """

    backends: tuple[str, ...] = ("onnxruntime",)
    fewer_threads: bool = False
    seconds: float = TUNING_SECONDS
    stages: int = DEFAULT_STAGES
    fine: bool = True

    def __post_init__(self) -> None:
        if wrong := [name for name in self.backends if name not in CPU_BACKENDS]:
            raise MisuseError(f"backend {wrong[0]!r}; choose {' or '.join(CPU_BACKENDS)}")
        if not self.backends:
            raise MisuseError(f"no backend to choose from; name {' or '.join(CPU_BACKENDS)}")
        if not self.seconds > 0:
            raise MisuseError(f"{self.seconds} seconds of measuring; give more than 0")
        if self.stages < 1:
            raise MisuseError(f"--stages {self.stages}; give 1 (not cut) or more")


@dataclass(frozen=True)
class TensorRTOptions:
    """How TensorRT, or TensorRT for RTX, builds a plan.

    Attributes:
        targets: as `parse_targets` gives them. A BuildConfig puts its own here.
        workspace: bytes of scratch memory that a layer may take; None: all there is. TensorRT for RTX compiles the
            network into one layer, so there it bounds the activations of every profile.
        timing_cache: file of kernels' timings, read where it fits and written again.
        hardware: other GPUs that the plan runs on: a key of HARDWARE_LEVELS.
        version_compatible: runs in later versions of TensorRT too.
        platform: that the plan runs on: a key of PLATFORMS; None: that of this machine.
        level: of the builder's optimisation, 0 to 5; None: TensorRT's own.
        timeout: seconds; None: no limit.
    """

    targets: tuple[str, ...] = (THIS_GPU,)
    workspace: int | None = None
    timing_cache: Path | None = None
    hardware: str = "none"
    version_compatible: bool = False
    platform: str | None = None
    level: int | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        parse_targets(",".join(self.targets))
        if self.workspace is not None and self.workspace < 1:
            raise MisuseError(f"--workspace of {self.workspace} bytes; give more than 0, or omit it for no limit")
        if self.hardware not in HARDWARE_LEVELS:
            raise MisuseError(f"--hardware-compatible {self.hardware!r}; choose one of {', '.join(HARDWARE_LEVELS)}")
        if self.level is not None and not 0 <= self.level <= 5:
            raise MisuseError(f"optimisation level {self.level}; choose 0 (fast build) to 5 (fast engine)")
        if self.timeout is not None and not self.timeout > 0:
            raise MisuseError(f"--timeout {self.timeout}; give seconds, more than 0")
        for given, option in ((self.hardware != "none", "hardware"), (self.version_compatible, "version")):
            if given and self.targets != (THIS_GPU,):
                raise MisuseError(
                    f"--{option}-compatible is for --target {THIS_GPU} with TensorRT; a plan of TensorRT for RTX runs "
                    "on the targets it names, such as sm86,sm89,sm120"
                )
        if self.platform is not None:
            self._check_platform()
        if self.timing_cache is not None and self.timing_cache.is_dir():
            raise MisuseError(f"{self.timing_cache} is a folder; --timing-cache names a file")

    def _check_platform(self) -> None:
        here = platform_name()
        if self.platform not in PLATFORMS:
            raise MisuseError(f"--platform {self.platform!r}; choose {' or '.join(PLATFORMS)}, or omit it for {here}")
        if here not in (BUILDS_FOR_WINDOWS, PLATFORMS[self.platform]):
            raise MisuseError(
                f"--platform {self.platform}: they are built on {BUILDS_FOR_WINDOWS} or there, and this is {here}"
            )
        if self.version_compatible and self.builds_for != here:
            raise MisuseError(
                f"--version-compatible brings the runtime of this machine along, and --platform {self.platform} needs "
                "another; omit one of them"
            )

    @property
    def builds_for(self) -> str:
        """The platform that a plan of TensorRT runs on, as manifests have it; those of TensorRT for RTX run on more."""
        return platform_name() if self.platform is None else PLATFORMS[self.platform]


_OPTIONS = {
    "platform": "--platform",
    "batch": "--max-batch",
    "workspace": "--workspace",
    "timing_cache": "--timing-cache",
    "hardware": "--hardware-compatible",
    "version_compatible": "--version-compatible",
    "level": "the optimisation level",
    "timeout": "--timeout",
}  # fields as the command line names them


@dataclass(frozen=True)
class BuildConfig:
    """What `build_engine` is told.

    Attributes:
        target: `cpu`; GPUs as `sm86,sm89` or `rtx4090`, kept as compute capabilities; `cuda`, the GPU of this machine;
            or a provider of ONNX Runtime on a GPU: a key of ORT_TARGETS.
        quantization: which precisions, by which images, at what cost.
        sizes: of the images that will come: TensorRT's profiles are planned from them, and latencies are measured at
            some of them. None: one profile for everything up to 2176×3840.
        latency_sizes: (height, width) of the latencies in the report; None: some of `sizes`, or, where those are not
            given either, see runtime.latency.timed_sizes.
        tuning: what to choose among for a CPU; None: ONNX Runtime.
        tensorrt: how TensorRT builds; its `workspace` also bounds the profiles' activation memory.
        profiles: TensorRT's, at most; None: as many as `sizes` make worth it.
        batch: most images at once, of TensorRT's profiles; None: DEFAULT_BATCH, and 8 of profiles for small images.
        threads: of the measurements; None: one per physical core.
        precision_report: CSV file to write, which ranks every layer by what it costs in low precision.
        rank_layers: measure what each layer costs, for the engine's report; `precision_report` does so anyway.

    Raises:
        MisuseError: options that contradict each other, or that nothing uses: the value, the rule and the remedy.
    """

    target: str = CPU
    quantization: QuantizationOptions = field(default_factory=QuantizationOptions)
    sizes: Sizes | None = None
    latency_sizes: tuple[Size, ...] | None = None
    tuning: TuningOptions | None = None
    tensorrt: TensorRTOptions | None = None
    profiles: int | None = None
    batch: int | None = None
    threads: int | None = None
    precision_report: Path | None = None
    rank_layers: bool = False

    def __post_init__(self) -> None:
        if self.latency_sizes is None and self.sizes is not None:
            object.__setattr__(self, "latency_sizes", self.sizes.examples())
        if self.latency_sizes is not None:
            object.__setattr__(self, "latency_sizes", tuple((height, width) for height, width in self.latency_sizes))
        named = capability(self.target)
        object.__setattr__(self, "target", named if named in ALONE else ",".join(parse_targets(self.target)))
        self._check_target()
        self._check_precision()
        if self.threads is not None and self.threads < 1:
            raise MisuseError(f"--threads {self.threads}; give 1 or more")

    def _check_target(self) -> None:
        """Refuse what another kind of target is needed for."""
        if not self.on_cpu and self.tuning is not None:
            option = "--stages" if self.tuning.stages != DEFAULT_STAGES else "--backend"
            raise MisuseError(f"{option} is for --target {CPU}; omit it")
        if self.on_ort_gpu and self.quantization.fastest:
            raise MisuseError(f"--fastest is for --target {CPU} and for TensorRT's plans, not {self.target}; omit it")
        if self.on_tensorrt:
            if self.profiles is not None and self.sizes is None:
                raise MisuseError("--profiles divides the sizes of --sizes; pass them")
            check_profile_options(self.sizes, self.profiles, self.largest_batch)
            _ = self.tensorrt_options
            return
        given = [name for name in ("profiles", "batch") if getattr(self, name) is not None]
        if self.tensorrt is not None:
            given += [item.name for item in fields(self.tensorrt) if getattr(self.tensorrt, item.name) != item.default]
        for name in given:
            raise MisuseError(f"{_OPTIONS.get(name, f'--{name}')} is for TensorRT; name GPUs with --target")

    def _check_precision(self) -> None:
        if self.quantization.fp16 and self.on_cpu:
            raise MisuseError(
                "--fp16 is refused for the CPU: ONNX Runtime runs FP16 there in float32 with casts around it, slower "
                "and no smaller in memory; use --int8, or name a GPU with --target"
            )
        if self.fastest_plan:
            if self.precision_report is not None:
                raise MisuseError("--precision-report ranks the layers of one precision; omit it, or --fastest")
            return
        self._check_types_of_gpus()
        if self.quantization.int8 and self.on_tensorrt and "sm75" in self.tensorrt_options.targets:
            raise MisuseError(
                "--int8 is refused for sm75: TensorRT for RTX has no INT8 convolution there, nor in a plan for sm75 "
                "and others, and runs them in FP16 with more work around; use --fp16, or build sm75 apart"
            )
        if self.precision_report is not None and self.quantization.precision == "float32":
            raise MisuseError("--precision-report is for low precision; pass --int8, --fp8, --fp16 or --bf16")

    def _check_types_of_gpus(self) -> None:
        """Refuse FP8 and BF16 where the target has no such arithmetic."""
        for name in self.gpu_types:
            if name == "bf16" and self.on_cpu:
                self._check_bf16_on_cpu()
                continue
            if not self.on_tensorrt:
                raise MisuseError(
                    f"--{name} is for TensorRT's plans, not for --target {self.target}: name GPUs with --target, such "
                    f"as {LEAST_GPU[name]}, or use --int8"
                )
            for target in self.tensorrt_options.targets:
                check_type(name, target)

    def _check_bf16_on_cpu(self) -> None:
        """Refuse what OpenVINO, which runs a whole network in BF16, does not do."""
        if self.quantization.quantized:
            raise MisuseError("--int8 and --bf16 together are for GPUs; on the CPU pass one of them")
        if self.precision_report is not None:
            raise MisuseError("--precision-report ranks layers, and OpenVINO runs all of them in BF16; omit it")
        if self.tuning is not None and "openvino" not in self.tuning.backends:
            raise MisuseError("--bf16 on the CPU is run by OpenVINO: omit --backend, and pip install openvino")

    @property
    def gpu_types(self) -> tuple[str, ...]:
        """What is asked for of the types that not every GPU has: keys of LEAST_GPU."""
        return tuple(name for name in LEAST_GPU if getattr(self.quantization, name))

    @property
    def on_cpu(self) -> bool:
        return self.target == CPU

    @property
    def stages(self) -> int:
        """That the core is cut into, at most: on a GPU one."""
        return (self.tuning or TuningOptions()).stages if self.on_cpu else 1

    @property
    def on_ort_gpu(self) -> bool:
        """Whether ONNX Runtime runs the engine on a GPU."""
        return self.target in ORT_TARGETS

    @property
    def on_tensorrt(self) -> bool:
        return not self.on_cpu and not self.on_ort_gpu

    @property
    def fastest_plan(self) -> bool:
        """Whether plans of all precisions are built, and one of them is kept."""
        return self.on_tensorrt and self.quantization.fastest

    @property
    def largest_batch(self) -> int:
        """Most images at once, of TensorRT's profiles."""
        return DEFAULT_BATCH if self.batch is None else self.batch

    @property
    def tensorrt_options(self) -> TensorRTOptions:
        """TensorRT's options for this target."""
        return replace(self.tensorrt or TensorRTOptions(), targets=tuple(parse_targets(self.target)))

    @property
    def files(self) -> dict[str, Path]:
        """Option → file that is written, or read and written: none may be another's, the model or the engine."""
        paths = {
            "--precision-report": self.precision_report,
            "--ranges": self.quantization.ranges,
            "--timing-cache": self.tensorrt.timing_cache if self.tensorrt is not None else None,
        }
        return {option: path for option, path in paths.items() if path is not None}
