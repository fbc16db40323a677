"""PyTorch's two exporters, made quiet and bounded in time: a network as the graph that one of them writes."""

import io
import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout

import onnx
import torch
from fcn_deploy.export.analysis.accepted_sizes import AcceptedSizes
from fcn_deploy.export.from_torch.network import Network, traced_size
from fcn_deploy.export.graph.edit import opset
from fcn_deploy.export.passes.fold_constants import fold_constants
from fcn_deploy.fcn.exportable import Exportable
from fcn_deploy.fcn.foreign import ScoresModule
from fcn_deploy.fcn.programs import is_script
from fcn_deploy.fcn.traced_numbers import numbers_of_sizes
from fcn_deploy.runtime.errors import DeployError, one_line
from torch import nn
from torch.nn.utils import parametrize

EXPORTERS = ("torchscript", "dynamo")
# Of the processor, that an exporter may take; the symbolic arithmetic of one can go on for hours (windows of Swin).
SECONDS = 180
DYNAMO_OLDEST = 18  # opset; asked for an older one, it writes this without a word


def to_graph(
    network: Network, exporter: str, opset_version: int, numbers: bool = False
) -> tuple[onnx.ModelProto, list[str]]:
    """The module as one of PyTorch's exporters writes it, of the opset that was asked for; and what was respelled.

    `numbers`: what Python computes of sizes, as `int(h / 2)`, is kept as a function of them.
    """
    if exporter == "dynamo" and opset_version < DYNAMO_OLDEST:
        raise DeployError(f"it writes opset {DYNAMO_OLDEST} and newer, not {opset_version}")
    export_with = _torchscript if exporter == "torchscript" else _dynamo
    module, mode = network.module, Exportable()
    restored: AbstractContextManager[None] = nullcontext()
    if isinstance(module, ScoresModule):
        module.mode, restored = mode, module.kept.restored()
        module.kept.restore()

    def export(types: bool) -> onnx.ModelProto:
        with numbers_of_sizes(module, types) if numbers else nullcontext():
            return export_with(module, network.channels, network.sizes, opset_version)

    try:
        with restored, _weights_computed(module), _quiet(), _within(SECONDS, exporter):
            try:
                graph = export(types=True)
            except TypeError:  # as of `dtype=float`
                if not numbers:
                    raise
                graph = export(types=False)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the exporters wrap what happened in advice
            cause = cause.__cause__
        raise DeployError(f"{type(cause).__name__}: {one_line(cause, 300)}") from error
    finally:
        if isinstance(module, ScoresModule):
            module.mode = nullcontext()
    if opset(graph) != opset_version:
        raise DeployError(f"it wrote opset {opset(graph)} instead of {opset_version}")
    respelled = [f"{', '.join(sorted(mode.respelled))}: written as operators that take every size"]
    kept = [f"{network.name} makes plain numbers of sizes, as int() does; they are kept as functions of the size"]
    return fold_constants(graph).model, [*(respelled if mode.respelled else []), *(kept if numbers else [])]


@contextmanager
def _weights_computed(model: nn.Module) -> Iterator[None]:
    """While it is entered, weights that are parametrised, as by spectral_norm, are what they come to."""
    computed: list[nn.Module] = []
    try:
        for layer in nn.Module.modules(model):
            if parametrize.is_parametrized(layer):
                for name, each in layer.parametrizations.items():  # type: ignore[operator, union-attr]
                    with torch.no_grad():
                        weight = getattr(layer, name)
                    vars(each)["forward"] = lambda weight=weight: weight
                    computed.append(each)
        yield
    finally:
        for each in computed:
            del vars(each)["forward"]


def _torchscript(model: nn.Module, channels: int, sizes: AcceptedSizes, opset_version: int) -> onnx.ModelProto:
    buffer, image = io.BytesIO(), torch.zeros(1, channels, *traced_size(sizes))
    if is_script(model):  # freezing writes its calls and lists out, as the exporter wants them
        model = torch.jit.freeze(torch.jit.trace(model, image, check_trace=False).eval())
    free = {0: "N"} if sizes.only is not None else {0: "N", 2: "H", 3: "W"}
    torch.onnx.export(
        model,
        (image,),
        buffer,  # type: ignore[arg-type]  # its annotation forgets what its docstring allows
        dynamo=False,
        opset_version=opset_version,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": free, "logits": free},
    )
    return onnx.load_from_string(buffer.getvalue())


def _dynamo(model: nn.Module, channels: int, sizes: AcceptedSizes, opset_version: int) -> onnx.ModelProto:
    batch, rows, columns = (torch.export.Dim(letter) for letter in ("N", "h", "w"))
    program = torch.onnx.export(
        model,
        # Batch 2: a batch of 1 would be taken for a constant.
        (torch.zeros(2, channels, *traced_size(sizes)),),
        dynamo=True,
        opset_version=opset_version,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=(
            {0: batch} if sizes.only else {0: batch, 2: sizes.multiple * rows, 3: sizes.multiple * columns},
        ),
    )
    assert program is not None
    return program.model_proto


@contextmanager
def _within(seconds: int, exporter: str) -> Iterator[None]:
    """Raise TimeoutError where it takes longer; in the main thread alone, where Python lets that be done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*signal_and_frame) -> None:
        raise TimeoutError(f"{exporter} had not finished after {seconds} s of the processor")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, 5)  # again, where PyTorch takes the first for a failure of its own
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters print and warn much that is no user's business; errors still come as exceptions."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    # It prints whole graphs from C++, whether that is asked for or not.
    printed = torch._C._jit_onnx_log
    torch._C._jit_onnx_log = lambda *parts: None
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch._C._jit_onnx_log = printed
        logging.disable(level)
