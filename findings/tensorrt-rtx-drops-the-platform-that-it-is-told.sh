#!/usr/bin/env bash
# TensorRT for RTX has RuntimePlatform.WINDOWS_AMD64, takes it without an error, and builds as if it had not been said.
#
# Seen with tensorrt-rtx-cu13 1.7.1.116 on Linux x86-64. Its help says: "Currently this flag can only be enabled when
# building engines on Linux AMD64 platforms." On Linux AMD64 `config.runtime_platform = WINDOWS_AMD64` raises nothing. The
# logger alone is told (API Usage Error: "does not support building engines on platforms other than Linux x86_64"), and the
# property reads SAME_AS_BUILD afterwards. A plan is built all the same.
#
# Why it matters: a builder that is told of the platform and does not read the log delivers a plan that is not what it
# was asked for, and finds out on the other system.
# Remedy: read the property back after it is set. With TensorRT for RTX say nothing: its plans are said to run on both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check tensorrt-rtx-cu13==1.7.1.116
"$work/venv/bin/python" - <<'EOF'
import platform
import sys

import tensorrt_rtx as trt


class Log(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.errors = []

    def log(self, severity, message):
        if severity == trt.ILogger.Severity.ERROR:
            self.errors.append(" ".join(message.split()))


print("tensorrt_rtx", trt.__version__, "on", platform.system(), platform.machine())
if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
    sys.exit("this shows what happens on Linux x86-64")
print("its help:", " ".join(trt.RuntimePlatform.WINDOWS_AMD64.__doc__.split("WINDOWS_AMD64 :")[-1].split()))
log = Log()
builder = trt.Builder(log)
network = builder.create_network(0)
image = network.add_input("image", trt.float32, (1, 3, 8, 8))
relu = network.add_activation(image, trt.ActivationType.RELU)
network.mark_output(relu.get_output(0))
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM89, 0)
log.errors.clear()
config.runtime_platform = trt.RuntimePlatform.WINDOWS_AMD64
said = next((each for each in log.errors if "setRuntimePlatform" in each), "nothing")
print("set without an exception; it now reads", config.runtime_platform)
print("the log:", said)
plan = builder.build_serialized_network(network, config)
print("a plan of", plan.nbytes, "bytes is built all the same")
if config.runtime_platform != trt.RuntimePlatform.SAME_AS_BUILD or "other than Linux x86_64" not in said:
    sys.exit("not seen any more: the platform is taken, or refused aloud")
EOF
