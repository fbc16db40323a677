"""Networks on OpenVINO's CPU plugin."""

import logging
import math
import os
import threading
from collections import defaultdict
from contextlib import suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import AnyArray
from ..errors import DeployError, MisuseError, one_line
from . import Layer
from .onnxruntime import OnnxRuntimeSession

if TYPE_CHECKING:
    import openvino

log = logging.getLogger(__name__)

# Kernels are prepared per input shape and kept, 5000 by default, which over changing sizes is most of a gigabyte.
# A network has one for most layers: these hold the last few shapes, and memory stays flat. Without any, each change of
# size costs 2 to 4 ms (EfficientNet-Lite0).
KEPT_KERNELS = 256
# Within a small budget, as each takes some 150 kB: those of one shape or two.
FEW_KERNELS, SMALL_BUDGET = 64, 1_000_000_000
# oneDNN, in OpenVINO, keeps up to 1024 kernels more by itself: some 60 MB, which nothing gives back.
ONEDNN_KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def installed() -> bool:
    """Whether openvino can be imported."""
    try:
        import openvino  # noqa: F401
    except ImportError:
        return False
    return True


def has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this CPU (AVX-512 BF16, AMX). Openvino is installed."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def bfloat16_or_fallback(source: str) -> bool:
    """Whether an engine that was built in bfloat16 runs in it here; where not, a logged warning that names `source`.

    It holds the float32 network, of which bfloat16 is a rounding. So float32 serves it with labels nearer to the
    model's, at the speed of float32.
    """
    if installed():
        if has_bfloat16():
            return True
        log.warning("%s was built in bfloat16, which this CPU does not have: it is run in float32", source)
    return False


def openvino_or_fallback(source: str) -> "type[OpenVinoSession] | type[OnnxRuntimeSession]":
    """OpenVinoSession; OnnxRuntimeSession, with a logged warning that names `source`, where openvino is not installed.

    Both read the same ONNX, so the engine serves either way, slower in one. What it was verified for holds in both:
    build-engine compares float32 labels on ONNX Runtime before it looks at OpenVINO, and INT8 passes the accuracy
    gate by the kernels of each. Within that, INT8 labels near a tie may differ between the two, as they round alike
    only almost. An openvino that is installed and fails is an error, never a reason to fall back.
    """
    if installed():
        return OpenVinoSession
    log.warning(
        "%s was measured fastest on OpenVINO, which is not installed: ONNX Runtime runs it; for its full speed: "
        "pip install 'fcn-deploy[openvino]'",
        source,
    )
    return OnnxRuntimeSession


class OpenVinoSession:
    """One network, ready to run at any size. Safe to use from many threads at once.

    Heights and widths stay dynamic: fixing them to one size gains nothing (measured, float32 and INT8). Where the
    kernels of this CPU err on narrow maps (`NarrowMaps`), inputs that have them run in float arithmetic.

    Args:
        model: serialised ONNX or path.
        input, output: names; None: the first.
        threads: of one run; None: one per physical core.
        source: names the engine in errors.
        measured: keep the time of each layer, for `profile`.
        integers: False computes what Q/DQ stand for in float32, as the reference does, by no INT8 kernel.
        bfloat16: compute in it, where layers of this CPU's can.
        memory: bytes that runs may take, where that was given.

    Attributes:
        streams: as of `Backend`. Each keeps its memory, and a run goes to any: they have SMALL_BUDGET each at least.

    Raises:
        DeployError: openvino is not installed, or it refuses the model.
    """

    name = "openvino"

    def __init__(
        self,
        model: bytes | str | os.PathLike[str],
        input: str | None = None,
        output: str | None = None,
        threads: int | None = None,
        source: str = "the engine",
        measured: bool = False,
        integers: bool = True,
        bfloat16: bool = False,
        memory: int | None = None,
    ) -> None:
        try:
            import openvino
        except ImportError as error:
            raise DeployError("openvino is not installed; run: pip install 'fcn-deploy[openvino]'") from error
        roomy, self.streams = memory is None or memory >= SMALL_BUDGET, 1
        if not roomy:
            _few_in_onednn()
        options: dict[str, Any] = {
            # On CPUs that have bfloat16 the plugin's default is to run float32 networks in it.
            "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            # Pinned threads of two engines, or of decoding, would fight for the same cores.
            "ENABLE_CPU_PINNING": False,
            "CPU_RUNTIME_CACHE_CAPACITY": str(KEPT_KERNELS if roomy else FEW_KERNELS),
            "PERF_COUNT": measured,
        }
        if threads is not None:
            # Calls from several threads run side by side where the cores allow, each on `threads` of them.
            self.streams = max(1, (os.cpu_count() or 1) // threads)
            if memory is not None:
                self.streams = min(self.streams, max(1, memory // SMALL_BUDGET))
            options |= {"NUM_STREAMS": self.streams, "INFERENCE_NUM_THREADS": threads * self.streams}
        if not integers:
            options["LP_TRANSFORMS_MODE"] = "NO"
        try:
            core = openvino.Core()
            network = core.read_model(model if isinstance(model, bytes) else os.fspath(model))
            _keep_biases(network)
            if not integers:
                _widen_weights(network)
            self._compiled = core.compile_model(network, "CPU", options)
            self.input, self.output = (
                input or self._compiled.inputs[0].any_name,
                output or self._compiled.outputs[0].any_name,
            )
            self._result = self._compiled.output(self.output)
            self._compiled.input(self.input)
        except RuntimeError as error:
            raise DeployError(f"OpenVINO cannot load the network of {source}: {one_line(error)}") from error
        narrow = NarrowMaps(network) if uses_amx(self._compiled) else None
        if narrow and not integers and narrow.possible:
            raise DeployError(f"this release of OpenVINO has no float arithmetic for {source}")
        self._narrow = narrow if narrow and narrow.possible else None
        self._in_float: OpenVinoSession | None = None
        self._open_in_float: partial[OpenVinoSession] | None = None
        if self._narrow is not None:  # otherwise the model, which is as much as the weights, is not held
            self._open_in_float = partial(
                OpenVinoSession, model, self.input, self.output, threads, source, measured, False, memory=memory
            )
        self._tensor, self._shape = openvino.Tensor, openvino.Shape
        self._measured = measured
        self._idle: list[Any] = []  # requests, each used by one call at a time
        self._lock = threading.Lock()

    def run(self, image: AnyArray) -> AnyArray:
        """[N, C, H, W] of the network's input type → [N, K, h, w]. Raises DeployError where the network fails."""
        return self._measured_run(image)[0]

    def _measured_run(self, image: AnyArray) -> tuple[AnyArray, list[Any]]:
        if self._narrow is not None and self._narrow.met_by(image.shape):
            return self._float_session()._measured_run(image)
        with self._lock:
            if self._compiled is None:
                raise MisuseError("the Segmenter was closed; open another one")
            compiled, port = self._compiled, self._result
            request = self._idle.pop() if self._idle else None
        try:
            request = request or compiled.create_infer_request()
            # The array is read in place, and the result written into memory of its own: no copies.
            request.set_tensor(self.input, self._tensor(np.ascontiguousarray(image), shared_memory=True))
            result = self._tensor(port.element_type, self._shape([0] * 4))
            request.set_tensor(port, result)
            request.infer()
            layers = request.profiling_info if self._measured else []
        except RuntimeError as error:
            raise DeployError(f"the network failed on an input of {list(image.shape)}: {one_line(error)}") from error
        with self._lock:
            if self._compiled is not None:
                self._idle.append(request)
        return result.data, layers

    def release(self, image: AnyArray) -> AnyArray:
        """As `Session` says. Each request keeps the memory of the largest image that it has seen."""
        with self._lock:
            self._idle = []
            if self._compiled is not None and hasattr(self._compiled, "release_memory"):  # since 2024.5
                with suppress(RuntimeError):  # another call runs
                    self._compiled.release_memory()
        return self.run(image)

    def _float_session(self) -> "OpenVinoSession":
        """The same network without INT8 kernels, opened when it is first wanted."""
        with self._lock:
            if self._compiled is None:
                raise MisuseError("the Segmenter was closed; open another one")
            if self._in_float is None:
                assert self._open_in_float is not None, "some maps may be narrow"
                try:
                    self._in_float = self._open_in_float()
                except DeployError as error:
                    raise DeployError(
                        f"OpenVINO's INT8 kernels for this CPU (AMX) err on images as narrow as this: {error}; build "
                        "the engine again with --backend onnxruntime"
                    ) from error
            return self._in_float

    def close(self) -> None:
        """Release the network. Running it afterwards raises MisuseError."""
        with self._lock:
            self._idle, self._compiled, self._result = [], None, None
            if self._in_float is not None:
                self._in_float.close()


@cache
def _few_in_onednn() -> None:
    """Have oneDNN keep no kernels of its own: from the first time that OpenVINO runs in this process, or not at all.

    It is told by the environment, which it reads once. The variable is not left there, since PyTorch's oneDNN reads it,
    too, and has no other cache. Who has set it is left alone.
    """
    import openvino
    import openvino.opset13 as operators

    if any(name.endswith("_PRIMITIVE_CACHE_CAPACITY") for name in os.environ):
        return
    os.environ[ONEDNN_KERNELS] = "0"
    try:
        image = operators.parameter([1, 8, 8, 8], np.float32)
        weights = operators.constant(np.ones((8, 8, 3, 3), np.float32))
        made = operators.convolution(image, weights, [1, 1], [1, 1], [1, 1], [1, 1])
        request = openvino.Core().compile_model(openvino.Model([made], [image]), "CPU").create_infer_request()
        request.infer([np.ones((1, 8, 8, 8), np.float32)])
    except RuntimeError:  # what fails here fails for the network, which says more
        log.info("oneDNN could not be told to keep no kernels")
    finally:
        os.environ.pop(ONEDNN_KERNELS, None)  # which another thread may have done


def _keep_biases(network: "openvino.Model") -> None:
    """Let no size that a quantised network reads of its maps be read before a bias, which is then forgotten.

    OpenVINO knows which sizes are equal, and takes single ones (as `x.shape[2]` is exported) from the first map that
    has them, which is a convolution before its bias is added. Its passes for low precision then take that bias for
    none: every branch that is resized to the size of another map, as in DeepLab's pooling, gets wrong scores. Of the
    greater of a size and 0 it does not know that it is equal to another.
    """
    import openvino.opset13 as operators

    nodes = list(network.get_ops())
    if not any(node.get_type_name() == "FakeQuantize" for node in nodes):
        return
    for node in nodes:
        if node.get_type_name() != "ShapeOf":
            continue
        sizes = node.output(0)
        readers = list(sizes.get_target_inputs())
        zero = operators.constant(np.zeros(1, sizes.get_element_type().to_dtype()))
        unknown = operators.maximum(sizes, zero).output(0)
        for reader in readers:
            reader.replace_source_output(unknown)


def _widen_weights(network: "openvino.Model") -> None:
    """Make floats of integer weights, which float kernels for 1×1 convolutions read wrongly."""
    import openvino.opset13 as operators

    for node in network.get_ops():
        if (
            node.get_type_name() == "Convert"
            and (weights := node.input_value(0).get_node()).get_type_name() == "Constant"
        ):
            floats = operators.constant(weights.get_data().astype(node.get_element_type().to_dtype()))
            node.output(0).replace(floats.output(0))


class NarrowMaps:
    """Which inputs of a network meet the sizes at which OpenVINO's AMX kernels err.

    Its low-precision convolutions for CPUs with AMX (`brgconv_avx512_amx`) that have a horizontal stride write rubbish
    where the map they make is one column wide and five rows high or more; seen from OpenVINO 2024.6 to 2026.4.1, at
    every kernel size from 2 to 7, stride, padding and number of channels tried. Other strides, wider maps, depthwise
    and transposed convolutions were right. How wide the maps are is asked of OpenVINO's own shape inference, once for
    each width that is narrower than what is known to be wide enough.

    Args:
        network: an `openvino.Model` of a dynamic width. It is kept, and its input is given fixed sizes.
    """

    def __init__(self, network: "openvino.Model") -> None:
        self._network = network
        self._strided = [node for node in network.get_ops() if _strided(node)]
        free = [axis for axis, length in enumerate(network.inputs[0].partial_shape) if length.is_dynamic]
        self._width_axis = max(free, default=-1)  # of [N, C, H, W] and [N, H, W, C] alike
        self._wide_from, self._narrow_to = math.inf, -1
        self._lock = threading.Lock()

    @property
    def possible(self) -> bool:
        """Whether any input meets them."""
        return bool(self._strided)

    def met_by(self, shape: tuple[int, ...]) -> bool:
        """Whether an input of this shape meets them, as far as the network takes that shape."""
        width = shape[self._width_axis]
        if width >= self._wide_from:
            return False
        with self._lock:
            if width <= self._narrow_to:
                return True
            try:
                self._network.reshape(list(shape))
                narrow = any(node.output(0).shape[3] == 1 for node in self._strided)
            except RuntimeError:  # a run of it says what is wrong
                return False
            if narrow:
                self._narrow_to = width
            else:
                self._wide_from = min(self._wide_from, width)
            return narrow


def _strided(node: Any) -> bool:
    """Whether this is a convolution with a horizontal stride, and not depthwise."""
    kind = node.get_type_name()
    if kind not in ("Convolution", "GroupConvolution") or node.get_attributes()["strides"][-1] < 2:
        return False
    return kind == "Convolution" or not all(length == 1 for length in list(node.input(1).get_partial_shape())[1:3])


def uses_amx(compiled: Any) -> bool:
    """Whether a compiled network has convolutions on AMX's tiles."""
    return any(
        "amx" in node.get_rt_info()["primitiveType"].astype(str) for node in compiled.get_runtime_model().get_ops()
    )


def profile(
    model: bytes | str | os.PathLike[str],
    image: AnyArray,
    input: str | None = None,
    output: str | None = None,
    threads: int | None = None,
    runs: int = 5,
) -> tuple[list[Layer], AnyArray]:
    """Median time of each layer over some runs on one input, in the order they run, and the output."""
    session = OpenVinoSession(model, input, output, threads, measured=True)
    times: defaultdict[str, list[float]] = defaultdict(list)
    kinds: dict[str, tuple[str, str]] = {}
    result = session.run(image)  # kernels are prepared
    for _ in range(runs):
        result, layers = session._measured_run(image)
        for layer in layers:
            times[layer.node_name].append(layer.real_time.total_seconds() * 1e3)
            kinds[layer.node_name] = (layer.node_type, layer.exec_type)
    session.close()
    return [
        Layer(name, kinds[name][0], float(np.median(values)), kinds[name][1])
        for name, values in times.items()
        if max(values) > 0
    ], result
