"""What TensorRT complains of, in one line that has the remedy."""

import re
from collections.abc import Sequence

from fcn_deploy.export.build.config import TensorRTOptions
from fcn_deploy.runtime.errors import DeployError

LIBRARY_NAMES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}  # module → name in errors


def too_long(timeout: float, phase: str) -> DeployError:
    return DeployError(
        f"the build took longer than --timeout {timeout:g} s, and was stopped while {phase}; allow more, or give fewer "
        "profiles or a --timing-cache"
    )


def tidied(message: str) -> str:
    """A message without the places in TensorRT's source."""
    message = re.sub(r"\s*(?:\.|,)?\s*In \w+ at \S+:\d+", "", " ".join(message.split()))
    message = re.sub(r"^\[?[\w.]+::\w+::\d+\]?\s*|^[\w:]+: (?=Error Code)|^ModelImporter\.cpp:\d+: ", "", message)
    return message[:300]


def reason_of(errors: Sequence[str]) -> str:
    """The first error that is not about a driver, which a machine without a GPU complains of in passing."""
    real = [error for error in errors if "cudaError 35" not in error]
    return tidied((real or list(errors) or [""])[0])


def refused(parser, log) -> DeployError:
    """What the ONNX parser says, with the node, its operator and a remedy."""
    if not parser.num_errors:
        return DeployError(f"TensorRT cannot read the network: {reason_of(log.errors) or 'no reason given'}")
    error = parser.get_error(0)
    operator, node = error.node_operator(), error.node_name()
    reason = tidied(error.desc().split("\n")[-1 if "Invalid Node" in error.desc().split("\n")[0] else 0])
    everything = " ".join([error.desc(), *log.errors])
    if "zero point" in everything:
        reason = "a zero point that is not 0"
        remedy = "it is quantized for CPUs; start from the float32 model and let build-engine --int8 quantize for GPUs"
    elif "input has type Int32" in everything:
        reason = "an int32 bias"
        remedy = "it is quantized for CPUs; start from the float32 model, or leave biases in float (QuantizeBias=False)"
    elif "UNSUPPORTED" in str(error.code()) or "Plugin not found" in everything:
        reason = "TensorRT has no such operator" if "Plugin not found" in everything else "it is not supported so"
        remedy = "replace it in the network before export, or build for --target cpu"
    else:
        remedy = "change it in the network before export, or build for --target cpu"
    return DeployError(f"TensorRT refuses node {node or error.node()} ({operator}): {reason}; {remedy}")


def failed(name: str, log, options: TensorRTOptions) -> DeployError:
    reason = reason_of(log.errors) or "no reason given"
    everything = " ".join(log.errors)
    if log.inconsistent:
        remedy = "its largest size is too large: give smaller --sizes or --max-batch (the runtime tiles larger images)"
    elif re.search(r"OutOfMemory|out of memory|workspace|MemoryAllocation", everything):
        if "no tactics" in everything:
            reason = "no kernel works in so little scratch memory"
        remedy = "give smaller --sizes or --max-batch, or free memory of the GPU"
        if options.workspace is not None:
            remedy = f"raise --workspace ({options.workspace / 1e6:,.0f} MB), or give smaller --sizes or --max-batch"
    elif "libnvinfer_lean" in everything:
        remedy = "omit --version-compatible, or install TensorRT's lean runtime"
    elif all(re.search(r"cudaError 3[56]\b", error) for error in log.errors):  # no driver, or one too old
        remedy = "it needs a GPU and its driver; name the GPUs to build for, such as --target sm86,sm89,sm120"
    else:
        remedy = "try another version of it, or --target cpu"
    return DeployError(f"{LIBRARY_NAMES[name]} cannot build the network: {reason}; {remedy}")
