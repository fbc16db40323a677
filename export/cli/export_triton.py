"""export-triton: a Triton model repository of an engine."""

from pathlib import Path
from typing import Annotated

import typer
from fcn_deploy.runtime.command import Force, Json, Memory, Threads, log_to_stderr, print_record, run


def export_triton(
    engine: Annotated[Path, typer.Argument(help="An .engine.", metavar="ENGINE")],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FOLDER", help="The model repository, a folder; made if need be.")
    ],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the model [default: the engine file's].")
    ] = None,
    model_version: Annotated[int, typer.Option(min=1, help="Version of the model.")] = 1,
    outputs: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Outputs of the model, of labels, masks, values, probabilities and scores [default: what the network "
            "gives].",
        ),
    ] = None,
    refine: Annotated[
        bool, typer.Option("--refine", help="Let borders of labels follow the borders in the image.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="Processes that each open the engine.")] = 1,
    max_batch: Annotated[int, typer.Option(min=1, help="Images that the server hands over together, at most.")] = 8,
    queue: Annotated[
        int, typer.Option(min=0, help="Requests that wait at most; more are refused (0: without end).")
    ] = 64,
    timeout: Annotated[
        float | None, typer.Option(min=0.001, metavar="SECONDS", help="Refuse what has waited for longer.")
    ] = None,
    warmup: Annotated[
        str | None,
        typer.Option(metavar="HxW,…", help="Sizes run before the model is ready, as 480x640,1080x1920, or a folder."),
    ] = None,
    site_packages: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", exists=True, file_okay=False,
            help="Where fcn-deploy is installed, if the server's Python does not find it.",
        ),
    ] = None,
    threads: Threads = None,
    memory: Memory = None,
    json_: Json = False,
    force: Force = False,
) -> None:  # fmt: skip
    """Write a model repository for Triton's Python backend: images of any size in, labels of that size out."""
    log_to_stderr()
    from fcn_deploy.export.triton.repository import TritonConfig, parse_outputs, write_repository
    from fcn_deploy.runtime.sizes import parse_sizes

    config = TritonConfig(
        name, model_version, tuple(parse_outputs(outputs)), processes, max_batch, queue, timeout,
        tuple(parse_sizes(warmup).examples()) if warmup else (), threads, memory, refine, site_packages,
    )  # fmt: skip
    model = write_repository(engine, out, config, force)
    if json_:
        print_record("triton", {"engine": str(engine), "model": str(model), "version": model_version})
    else:
        print(f"{model}, version {model_version} → tritonserver --model-repository {out.absolute()}")


def main() -> None:
    run(export_triton, "export-triton")
