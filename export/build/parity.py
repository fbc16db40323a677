"""Whether what was built gives what the model gives, at sizes of all kinds."""

from dataclasses import replace

import numpy as np
from fcn_deploy.calibration.report.engine_report import Agreement
from fcn_deploy.export.analysis.model_end import ends_in_sigmoid
from fcn_deploy.export.analysis.near_ties import picks_places, rounded_otherwise
from fcn_deploy.export.importer.import_model import ImportedModel
from fcn_deploy.export.tolerances import DECISION_MARGIN, GOLDEN_SAMPLE, REORDERED_SUMS
from fcn_deploy.runtime.backends.onnxruntime import OnnxRuntimeSession
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.engine_format.stage import Upsampling
from fcn_deploy.runtime.errors import DeployError
from fcn_deploy.runtime.head.score_window import ScoreWindow
from fcn_deploy.runtime.head.upsampling import result_from_scores
from fcn_deploy.runtime.network import Network
from fcn_deploy.runtime.pixels.noise_image import natural_noise
from fcn_deploy.runtime.pixels.prepare import prepare

COMPARED_SIZES = ((1, 1), (7, 13), (37, 41), (61, 97), (136, 17), (200, 333), (257, 263), (480, 640))


def compare_each(imported: ImportedModel, net: Network) -> list[Agreement]:
    """`compare` of each output of a model. Raises DeployError."""
    if not imported.further:
        return [compare(imported, net)]
    return [compare(each, net, each.output) for each in (imported, *imported.further)]


def compare(imported: ImportedModel, net: Network, output: str = "") -> Agreement:
    """What the engine gives against the model's own output, at mixed sizes.

    Args:
        imported: the model of that output.
        net: the engine.
        output: name of one of several.

    Raises:
        DeployError: a label differs where the model decided, or a value by more than REORDERED_SUMS of the range.
    """
    card = net.heads.card_of(output)
    kind, name = card.kind, f"{output}/{card.kind}" if output else card.kind
    backend = OnnxRuntimeSession(imported.model.SerializeToString())
    unpadded = replace(net.card, size_multiple=1, smallest=1)
    full_size = Upsampling(activated=ends_in_sigmoid(imported.model))  # thresholds of masks are probabilities then
    # Integers may be rounded the other way by kernels that were fused.
    margin = GOLDEN_SAMPLE["int8"] if imported.quantised else DECISION_MARGIN
    picks = picks_places(imported.model)
    equal = undecided = wrong = pixels = 0
    difference = 0.0
    for index, (height, width) in enumerate(COMPARED_SIZES):
        image = natural_noise(height, width, net.card, seed=index + 1)
        try:
            logits = backend.run(prepare(image, unpadded))[0]
        except DeployError as error:
            raise DeployError(
                f"the model itself fails at {height}×{width}, so it has a size baked in; export-onnx names the "
                f"cause for PyTorch models: {error}"
            ) from error
        if logits.shape[1:] != (height, width):
            raise DeployError(
                f"the model gives {logits.shape[1]}×{logits.shape[2]} scores for an image of {height}×{width}; "
                "it must give one per pixel at every size"
            )
        whole = ScoreWindow.whole(logits, (height, width), (height, width))
        expected = result_from_scores(kind, whole, full_size, imported.card)
        found = net.result(image, name)
        pixels += found.size
        if kind == "values":
            difference = float(np.maximum(difference, np.abs(found - expected).max() / (np.ptp(logits) or 1.0)))
            continue
        clear = decided(logits, imported.card, full_size.activated, margin)
        differs = found != expected
        for others in rounded_otherwise(prepare(image, unpadded)) if picks else ():
            if not (differs & clear).any():
                break
            other = whole.holding(backend.run(others)[0])
            clear &= ~differs | (found != result_from_scores(kind, other, full_size, imported.card))
        equal += int((~differs).sum())
        undecided += int((~clear).sum())
        wrong += int((differs & clear).sum())
    sizes = tuple(f"{height}x{width}" for height, width in COMPARED_SIZES)
    if kind == "values":
        if not difference <= max(REORDERED_SUMS, margin):
            raise DeployError(
                f"the engine's {name} are not the model's: they differ by {difference:.1e} of their range; please "
                "report the model"
            )
        return Agreement(sizes, pixels, kind, difference=difference)
    if wrong:
        raise DeployError(
            f"the engine's {name} are not the model's: {wrong} of {pixels} pixels differ; please report the model"
        )
    return Agreement(sizes, pixels, kind, labels_equal=equal / pixels, undecided=undecided / pixels, wrong=wrong)


def decided(
    logits: np.ndarray, card: ModelCard, activated: bool = False, margin: float = DECISION_MARGIN
) -> np.ndarray:
    """Where the two best of [K, H, W] scores (or a score and its threshold) differ by more than `margin`: bool.

    [H, W], or [K, H, W] of masks. `activated`: the scores of masks are probabilities.
    """
    spread = float(np.ptp(logits)) or 1.0
    if card.activation == "multilabel":
        thresholds = np.array(card.thresholds if activated else card.score_thresholds)
        return np.abs(logits - thresholds[:, None, None]) > margin * spread
    if card.activation != "softmax":
        return np.abs(logits[0] - card.score_threshold) > margin * spread
    if len(logits) == 1:
        return np.ones(logits.shape[1:], bool)
    best = np.partition(logits, -2, axis=0)[-2:]
    return best[1] - best[0] > margin * spread
