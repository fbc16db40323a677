"""What a file is, for `inspect-model`: an engine (engine.py, needs a runtime alone) or an ONNX model (onnx_model.py).

Both give a record, a dict that JSON can hold, of the same form as far as they go; text.py writes it for people.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fcn_deploy.export.inspect.record import IMAGE_MEMORY
from fcn_deploy.runtime.errors import MisuseError
from fcn_deploy.runtime.extras import need
from fcn_deploy.runtime.process_memory import available_memory

if TYPE_CHECKING:
    from fcn_deploy.export.importer.options import ImportOptions


def is_engine(path: Path) -> bool:
    """Whether a file is an engine, by its first bytes or its name."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04" or path.suffix.lower() == ".engine"


def inspect_file(
    path: Path,
    target: str | None = None,
    memory: int | None = None,
    options: "ImportOptions | None" = None,
    thorough: bool = False,
    tell: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """What is known of an engine or an ONNX model, and found by running it.

    Args:
        path: of an .onnx model or an .engine.
        target: what an ONNX is tried for: `cpu`, or GPUs as in parse_targets; None: the CPU, and the parser of
            TensorRT where one is installed.
        memory: bytes that the largest image may take; None: IMAGE_MEMORY, or half of what is free.
        options: what the user says of an ONNX that carries no card.
        thorough: run the largest image that memory allows, and compare a freed model with larger images, however long
            that takes.
        tell: called with what of an ONNX's record its file tells, before it is run.

    Returns:
        A record, as `inspect-model --json` prints it; `ok`: every size that was tried works, and the target
        that was asked for can be built for.

    Raises:
        MisuseError: no such file or target.
        DeployError: a file that is broken, or neither.
    """
    if not path.is_file():
        raise MisuseError(f"{path} does not exist or is not a file; name an .onnx model or an .engine")
    memory = memory or min(IMAGE_MEMORY, available_memory() // 2)
    engine = is_engine(path)
    record = {"file": str(path), "kind": "engine" if engine else "onnx", "bytes": path.stat().st_size}
    if engine:
        from fcn_deploy.export.inspect.engine import inspect_engine

        return record | inspect_engine(path, memory, thorough)
    need("onnx", "export")
    need("onnxruntime", "cpu")
    from fcn_deploy.export.inspect.onnx_model import inspect_onnx_model

    return record | inspect_onnx_model(path, target, memory, options, thorough, lambda entries: tell(record | entries))
