"""inspect-model: what a model or an engine is, and whether any size really works."""

import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from fcn_deploy.export.cli.model_options import check_model
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
    thorough: Annotated[
        bool,
        typer.Option(
            "--thorough",
            help="Also do what takes long: run the largest image that memory allows, compare with larger images.",
        ),
    ] = False,
    json_: Json = False,
) -> int:
    """Tell what a model is, what of it runs where, and whether any size really works, by running it."""
    log_to_stderr(logging.ERROR)
    check_model(model, "an .onnx model or an .engine")
    from fcn_deploy.export.inspect import inspect_file, is_engine
    from fcn_deploy.export.inspect.text import file_as_text, findings_as_text, record_as_text

    need("onnxruntime", "cpu")
    if not is_engine(model):  # which a runtime alone reads
        need("onnx", "export")
    told = False

    def tell(record: dict[str, Any]) -> None:
        nonlocal told
        told = True
        print(file_as_text(record), flush=True)

    about = inspect_file(model, target, memory, thorough=thorough, tell=(lambda record: None) if json_ else tell)
    if json_:
        from fcn_deploy.export.cli.records import with_sizes

        print_record("inspection", about | {"agreement": with_sizes(about.get("agreement"))})
    else:
        print(findings_as_text(about) if told else record_as_text(about))
    return 0 if about["ok"] else FAILURE


def main() -> None:
    run(inspect_model, "inspect-model")
