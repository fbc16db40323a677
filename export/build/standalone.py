"""An ONNX that gives labels by itself, for runtimes other than ours."""

import os
from dataclasses import replace

from fcn_deploy.export.build.parity import COMPARED_SIZES, decided
from fcn_deploy.export.graph.edit import check, set_metadata
from fcn_deploy.export.importer.import_model import ImportedModel
from fcn_deploy.export.passes.fold_decision import fold_decision
from fcn_deploy.export.passes.fold_input import fold_input
from fcn_deploy.runtime.backends.onnxruntime import OnnxRuntimeSession, session
from fcn_deploy.runtime.engine_format.model_card import CARD_KEY
from fcn_deploy.runtime.engine_format.stage import Upsampling
from fcn_deploy.runtime.errors import DeployError, MisuseError
from fcn_deploy.runtime.files import replacing
from fcn_deploy.runtime.head.score_window import ScoreWindow
from fcn_deploy.runtime.head.upsampling import labels_from_scores
from fcn_deploy.runtime.pixels.noise_image import natural_noise
from fcn_deploy.runtime.pixels.prepare import prepare


def build_standalone(imported: ImportedModel, out: str | os.PathLike, threads: int | None = None) -> None:
    """Write an ONNX for other runtimes: `image`, uint8 [N,H,W,C], in; `labels`, [N,H,W], out; any size.

    Verified against the model at mixed sizes. Raises DeployError.
    """
    card = imported.card
    if card.kind != "labels":
        raise MisuseError(
            f"--standalone gives labels, and this model gives {card.kind} ({card.activation}): build an engine, or use "
            "the ONNX as it is"
        )
    model = fold_decision(fold_input(imported.model, card).model, card).model
    set_metadata(model, CARD_KEY, card.to_json())
    check(model, "the standalone model")
    run = session(model.SerializeToString(), threads)
    backend = OnnxRuntimeSession(imported.model.SerializeToString(), threads=threads)
    for index, (height, width) in enumerate(COMPARED_SIZES):
        image = natural_noise(height, width, card, seed=index + 1)
        logits = backend.run(prepare(image, replace(card, size_multiple=1, smallest=1)))[0]
        expected = labels_from_scores(ScoreWindow.whole(logits, (height, width), (height, width)), Upsampling(), card)
        labels = run.run(None, {"image": image[None]})[0][0]
        if labels.shape != expected.shape or (labels != expected)[decided(logits, card)].any():
            raise DeployError(f"the standalone model's labels differ from the model's at {height}×{width}")
    with replacing(out) as temporary:
        temporary.write_bytes(model.SerializeToString())
