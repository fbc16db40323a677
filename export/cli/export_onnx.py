"""export-onnx: a PyTorch network, or an ONNX of fixed size, as an ONNX that takes every size."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from fcn_deploy.calibration.report.layout import counted
from fcn_deploy.export.cli.model_options import RENAMED, ModelOptions, check_files_differ, check_model
from fcn_deploy.runtime.command import Force, Json, print_note, print_record, run
from fcn_deploy.runtime.errors import MisuseError
from fcn_deploy.runtime.extras import need
from fcn_deploy.runtime.files import check_writable, refuse_existing

if TYPE_CHECKING:
    from fcn_deploy.export.from_torch import SizeDifference
    from fcn_deploy.runtime.engine_format.model_card import ModelCard

DEFAULT_OPSET = 18


class Exporter(StrEnum):
    auto = "auto"
    torchscript = "torchscript"
    dynamo = "dynamo"


@dataclass(frozen=True)
class TorchOptions:
    """How a module of PyTorch is exported."""

    weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="State dict for a factory's module: .safetensors, or of torch.save."),
    ] = None
    exporter: Annotated[
        Exporter | None, typer.Option(help="Which of PyTorch's exporters is used; auto tries both [default: auto].")
    ] = None
    opset: Annotated[
        int | None, typer.Option(min=11, max=23, help=f"ONNX operator set to write [default: {DEFAULT_OPSET}].")
    ] = None


@dataclass(frozen=True)
class DeepnessOptions:
    """What Deepness, a plugin of QGIS, is told."""

    deepness: Annotated[
        float | None,
        typer.Option(
            min=0.01, metavar="CM",
            help="Write it for Deepness, a plugin of QGIS: probabilities, metadata and a tile size, for pixels of so "
            "many centimetres.",
        ),
    ] = None  # fmt: skip
    tile_size: Annotated[
        int | None, typer.Option("--tile-size", min=1, help="Side of Deepness's tiles in pixels [default: 512].")
    ] = None


def export_onnx(
    source: Annotated[
        str,
        typer.Argument(
            help="A checkpoint, package.module:factory giving a module, a saved program, or an ONNX.",
            metavar="SOURCE",
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="ONNX file to write.")],
    torch: TorchOptions,
    model: ModelOptions,
    deepness: DeepnessOptions,
    json_: Json = False,
    force: Force = False,
) -> None:
    """Export a network to ONNX that takes every size, and verify it at sizes it was never traced at."""
    if out.suffix.lower() != ".onnx":
        raise MisuseError(f"{out} is not named .onnx; the runtime tells models by that suffix")
    refuse_existing(out, force)
    if deepness.tile_size is not None and deepness.deepness is None:
        raise MisuseError("--tile-size is of --deepness; give both, or omit it")
    if source.lower().endswith(".onnx"):
        card = _free_sizes(source, out, torch, model, json_)
    else:
        card = _export_module(source, out, torch, model, json_)
    if deepness.deepness is not None:
        from fcn_deploy.export.deepness import write_for_deepness

        tile = deepness.tile_size or 512
        write_for_deepness(out, card, deepness.deepness, tile)
        if not json_:
            print(f"for Deepness: tiles of {tile}×{tile}, {deepness.deepness:g} cm a pixel")


def _export_module(source: str, out: Path, how: TorchOptions, model: ModelOptions, json_: bool) -> "ModelCard":
    """A checkpoint or a module of PyTorch."""
    if ":" not in source:
        check_model(Path(source), "a .safetensors checkpoint, or package.module:factory")
    if how.weights is not None:
        check_model(how.weights, "a file of weights")
    need("torch", "export")
    need("onnx", "export")
    need("onnxruntime", "cpu")
    check_writable(out)
    from fcn_deploy.export.from_torch import export_module
    from fcn_deploy.fcn.load_module import load_module

    said, opset = model.said(), how.opset or DEFAULT_OPSET
    notes: list[str] = []
    module, own = load_module(source, how.weights, notes.append)
    card, differences = export_module(
        module,
        own,
        out,
        exporter=(how.exporter or Exporter.auto).value,
        opset_version=opset,
        name=source,
        options=said,
        note=notes.append,
    )
    if json_:
        found = [{"size": list(each.size), "batch": each.batch, "logits": each.logits} for each in differences]
        _print_export(out, card, notes, found)
        return card
    _show_notes(notes)
    print(f"{source} → {out} ({out.stat().st_size / 1e6:.1f} MB, opset {opset})")
    print(
        f"takes every H, W ≥ 1; {len(card.classes)} classes, stride {card.stride}, {counted(card.channels, 'channel')}"
    )
    _show_differences(differences)
    return card


def _show_differences(differences: "Sequence[SizeDifference]") -> None:
    worst = max(differences, key=lambda difference: difference.logits)
    print("largest difference from PyTorch, as a share of the logits' range, at sizes never traced:")
    for difference in differences:
        size = f"{difference.size[0]}×{difference.size[1]}" + (f" ×{difference.batch}" if difference.batch > 1 else "")
        print(f"  {size:>11}  {difference.logits:.1e}{'  worst' if difference is worst else ''}")


def _free_sizes(source: str, out: Path, how: TorchOptions, model: ModelOptions, json_: bool) -> "ModelCard":
    """A model that is ONNX already: its sizes are freed."""
    for_torch = {"--exporter": how.exporter, "--opset": how.opset, "--weights": how.weights}
    if wrong := [name for name, value in for_torch.items() if value is not None]:
        raise MisuseError(f"{wrong[0]} is for modules of PyTorch, and {source} is ONNX already; omit it")
    check_model(Path(source))
    check_files_differ(Path(source), {"-o": out})
    need("onnx", "export")
    need("onnxruntime", "cpu")
    check_writable(out)
    from fcn_deploy.export.from_onnx import export_onnx_model

    card, notes = export_onnx_model(source, out, model.said())
    if json_:
        _print_export(out, card, notes, None)
        return card
    _show_notes(notes)
    print(f"{source} → {out} ({out.stat().st_size / 1e6:.1f} MB)")
    print(f"takes every H, W ≥ 1; {len(card.classes)} classes, {counted(card.channels, 'channel')}")
    return card


def _print_export(out: Path, card: "ModelCard", notes: Sequence[str], differences: list[dict] | None) -> None:
    fields = {"file": str(out), "card": json.loads(card.to_json()), "differences": differences, "notes": list(notes)}
    print_record("export", fields)


def _show_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print_note(note)


def main() -> None:
    run(export_onnx, "export-onnx", RENAMED)
