"""inspect-model: what a model or an engine is, and whether any size really works."""

import logging
from pathlib import Path
from typing import Annotated

import typer
from fcn_deploy.export.cli.options import check_model
from fcn_deploy.runtime.command import FAILURE, Json, Memory, log_to_stderr, print_record, run
from fcn_deploy.runtime.extras import need


def inspect_model(
    model: Annotated[Path, typer.Argument(help="A segmentation ONNX, or an engine.", metavar="MODEL")],
    target: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET",
            help="What an ONNX is tried for: cpu, or GPUs such as sm89 or sm86,sm120 "
            "[default: cpu, and TensorRT's parser where it is installed].",
        ),
    ] = None,
    memory: Memory = None,
    json_: Json = False,
) -> int:
    """Tell what a model is, what of it runs where, and whether any size really works, by running it."""
    log_to_stderr(logging.ERROR)
    check_model(model, "an .onnx model or an .engine")
    need("onnx", "export")
    need("onnxruntime", "cpu")
    from fcn_deploy.export import inspect

    about = inspect.inspect_model(model, _targets(target), memory)
    if json_:
        from fcn_deploy.export.cli.records import with_sizes

        print_record("inspection", about | {"agreement": with_sizes(about.get("agreement"))})
    else:
        print(inspect.show(about))
    return 0 if about["ok"] else FAILURE


def _targets(target: str | None) -> tuple[str, ...]:
    """What an ONNX is tried for; (): the usual. Raises MisuseError."""
    from fcn_deploy.export.build.config import parse_targets
    from fcn_deploy.runtime.backends import ORT_TARGETS

    if target is None:
        return ()
    return (target,) if target in ("cpu", *ORT_TARGETS) else (",".join(parse_targets(target)),)


def main() -> None:
    run(inspect_model, "inspect-model")
