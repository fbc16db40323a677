"""export-onnx of an ONNX model: one of a fixed size, or of multiples, as portable ONNX that takes every size."""

import os
from dataclasses import replace

import numpy as np
from fcn_deploy.export.analysis.model_end import find_end
from fcn_deploy.export.dynamic_shapes.compare_with_source import runner
from fcn_deploy.export.graph.edit import (
    Names,
    check,
    free_name,
    metadata,
    rename_reads,
    rename_result,
    set_shape,
    sign,
)
from fcn_deploy.export.importer.card import store_card
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.importer.options import ImportOptions
from fcn_deploy.runtime.engine_format.model_card import CARD_KEY, ModelCard
from fcn_deploy.runtime.errors import DeployError
from fcn_deploy.runtime.files import replacing
from onnx import ModelProto

# Where the model that is written is run: as export-onnx's other models are, one pixel and primes among them.
VERIFIED_SIZES = ((1, 1), (2, 3), (7, 13), (31, 33), (136, 17), (101, 211), (257, 263))


def export_onnx_model(
    path: str | os.PathLike, out: str | os.PathLike, options: ImportOptions | None = None
) -> tuple[ModelCard, list[str]]:
    """Write an ONNX model that takes every size, from one of a fixed size or of multiples: `image` → `logits`.

    Args:
        path: the model, any that build-engine takes.
        out: the .onnx file; nothing is written where something fails, and what was there stays.
        options: what the user says of it.

    Returns:
        (the card that was stored, what was assumed and changed, a line each).

    Raises:
        MisuseError: no such file.
        DeployError: a size cannot be freed, or the result is not the model; names the node or the size.
    """
    if options is not None:
        options.refuse_several("what export-onnx writes has one")
    imported = import_model(path, options)
    model, card = imported.model, imported.card
    if metadata(model, CARD_KEY) is None:
        card = _with_sizes(card, model)
    _check_sizes(model, card, str(path))
    _name_ends(model)
    set_shape(model.graph.input[0], ["N", card.channels, "H", "W"])
    set_shape(model.graph.output[0], ["N", card.scores, "H", "W"])
    sign(model)
    store_card(model, card)
    check(model, "the freed model")
    with replacing(out) as temporary:
        temporary.write_bytes(model.SerializeToString())
    return card, list(imported.notes)


def _with_sizes(card: ModelCard, model: ModelProto) -> ModelCard:
    """The card with the size multiple, the smallest size and the stride that the model's graph tells."""
    end = find_end(model)
    multiple, smallest = (1, 1) if end.padding is None else (end.padding.multiple, end.padding.smallest)
    stride = max(1, round(end.upsampling.factor[0])) if end.upsampling.factor else 1
    return replace(card, size_multiple=multiple, smallest=smallest, stride=stride)


def _check_sizes(model: ModelProto, card: ModelCard, name: str) -> None:
    """Raise DeployError where the model does not give full-size scores at some size."""
    run = runner(model)
    for height, width in VERIFIED_SIZES:
        scores = run(np.zeros((1, card.channels, height, width), np.float32))
        if scores.shape != (1, card.scores, height, width):
            raise DeployError(f"{name} gives {list(scores.shape)} for an image of {height}×{width}; please report it")


def _name_ends(model: ModelProto) -> None:
    """Call the input `image` and the output `logits`, whatever else bears these names."""
    ends = ((model.graph.input[0], "image", rename_reads), (model.graph.output[0], "logits", rename_result))
    # One of them may have the other's name.
    for value, name, rename in ends:
        aside = Names(model)(f"{name}/end")
        rename(model, value.name, aside)
        value.name = aside
    for value, name, rename in ends:
        free_name(model, name)
        rename(model, value.name, name)
        value.name = name
