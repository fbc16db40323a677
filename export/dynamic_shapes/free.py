"""An ONNX model whose sizes are freed, verified against the model itself before anything is written."""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from fcn_deploy.export.analysis.accepted_sizes import find_accepted_sizes
from fcn_deploy.export.analysis.upsampling import ends_in_sigmoid, find_end
from fcn_deploy.export.dynamic_shapes.solve import Freed, find_sizes
from fcn_deploy.export.graph.edit import (
    Names,
    check,
    dims,
    free_name,
    metadata,
    rename_reads,
    rename_result,
    set_metadata,
    set_shape,
)
from fcn_deploy.export.tolerances import FREED_SIZES, REORDERED_SUMS
from fcn_deploy.runtime.backends.onnxruntime import one_line, session
from fcn_deploy.runtime.errors import DeployError
from fcn_deploy.runtime.files import replacing
from fcn_deploy.runtime.model_card import ACTIVATED_KEY, CARD_KEY, ModelCard
from onnx import ModelProto

if TYPE_CHECKING:
    from fcn_deploy.export.importer.card import SourceOptions

# Where a freed model is run, in multiples of 16 pixels or of what it takes: not square, odd, small and larger.
UNSEEN = ((1, 2), (3, 1), (2, 5), (7, 3))
FATAL_ONLY = 4  # ONNX Runtime's severity: that a probed size fails is no error
# Where the model that is written is run: as export-onnx's other models are, one pixel and primes among them.
WRITTEN = ((1, 1), (2, 3), (7, 13), (31, 33), (136, 17), (101, 211), (257, 263))


def freed(model: ModelProto, name: str, size: tuple[int, int] | None = None) -> tuple[ModelProto, list[str], int]:
    """A model with free batch, height and width, verified; what was changed, a line each; a multiple.

    H and W must be multiples of that, whatever else runs: its padding was for such sizes.

    Args:
        model: float32 [N,C,H,W] → [N,K,h,w]; its sizes numbers, or names whether they hold or not.
        name: of the model, for notes and errors.
        size: (height, width) that it is known to run at, if any is.

    Raises:
        DeployError: a size cannot be freed; names the node.
    """
    try:
        found = find_sizes(model, size)
    except DeployError as error:
        # What has operators of its own, and names for all of its sizes, may well keep what the names promise.
        if all(isinstance(dim, int) for dim in (dims(model.graph.input[0])[place] for place in (0, 2, 3))):
            raise DeployError(f"{name}: {error}") from error
        try:
            find_accepted_sizes(_shapes(model, name), name)
        except DeployError:
            raise DeployError(f"{name}: {error}") from error
        return model, [], 1
    if not found.traced:
        return model, [], 1
    notes = [f"{name}: size freed: {note}" for note in found.notes]
    if not notes:
        notes = [f"{name}: its size of {_text(found.traced[1:])} is so by name alone, and freed"]
    return found.model, [*notes, f"{name}: {verify(model, found, name)}"], found.multiple


def verify(model: ModelProto, found: Freed, name: str) -> str:
    """Compare a freed model with what it was made from; one line of what was seen, and what could not be.

    - At the traced size both give the same scores.
    - At sizes that neither ever saw it runs, its scores follow the image, and a batch gives what its images give.
    - Of an image that goes on beyond the traced one, what lies out of reach of the traced one's edges has its scores.

    Raises:
        DeployError: one of these does not hold.
    """
    batch, *traced = found.traced
    before, after = _runs(model), _runs(found.model)
    random = np.random.default_rng(0)
    channels = dims(model.graph.input[0])[1]
    channels = channels if isinstance(channels, int) else 3

    def noise(count: int, height: int, width: int) -> np.ndarray:
        return random.standard_normal((count, channels, height, width), dtype=np.float32)

    image = noise(batch, *traced)
    expected, scores = before(image), after(image)
    spread = max(float(np.ptp(expected)), 1e-12)
    if scores.shape != expected.shape or not (own := float(np.abs(scores - expected).max()) / spread) <= FREED_SIZES:
        what = "scores of another shape" if scores.shape != expected.shape else f"scores {own:.1e} of their range away"
        raise DeployError(
            f"{name}: the freed model gives {what} at its own size of {_text(traced)}; please report the model"
        )
    try:
        taken = find_accepted_sizes(_shapes(found.model, name), name)
    except DeployError as error:
        raise DeployError(
            f"{error}. Its sizes were freed ({'; '.join(found.notes)}), and something still holds"
        ) from error
    multiple, factor = math.lcm(taken.multiple, found.multiple), taken.factor
    sizes = _unseen(multiple, taken.smallest, tuple(traced))
    for height, width in sizes:
        images = noise(2, height, width)
        scores = after(images)
        if scores.shape[2:] != (height // factor, width // factor) or len(scores) != 2:
            raise DeployError(
                f"{name}: the freed model gives {list(scores.shape)} for 2 images of {height}×{width}; please report it"
            )
        alone = after(images[1:])
        if not np.abs(scores[1:] - alone).max() <= REORDERED_SUMS * max(spread, float(np.ptp(alone))):
            raise DeployError(f"{name}: the freed model mixes the images of a batch, as seen at {height}×{width}")
    line = "exactly" if own == 0 else f"up to {own:.0e} of its scores' range"
    line = f"equal to the model at its own size of {_text(traced)}, {line}"
    line += f"; it runs at {len(sizes)} unseen sizes up to {_text(max(sizes))}"
    return line + "; " + _goes_on(before, after, found, image, expected, multiple, noise, name)


def _goes_on(before, after, found: Freed, image, expected, multiple: int, noise, name: str) -> str:
    """Compare what the original gives for an image with what the freed model gives where the image goes on."""
    if found.stretched:
        return f"its scores depend on the image's size by {found.stretched}: larger images cannot be compared with it"
    height, width = image.shape[2:]
    # What does not change with the half of the image at right and below does not see what lies beyond them.
    untouched = np.ones(expected.shape[2:], bool)
    for other in (noise(*image.shape[:1], height, width), 3 * noise(*image.shape[:1], height, width)):
        for part in ((slice(height // 2, None), slice(None)), (slice(None), slice(width // 2, None))):
            changed = image.copy()
            changed[:, :, *part] = other[:, :, *part]
            untouched &= (before(changed) == expected).all((0, 1))
    rows, columns = (multiple * max(1, side // (multiple * part)) for side, part in ((height, 2), (width, 3)))
    larger = noise(image.shape[0], height + rows, width + columns)
    larger[:, :, :height, :width] = image
    scores = after(larger)[:, :, : expected.shape[2], : expected.shape[3]]
    share = float(untouched.mean())
    if share < 0.01:
        return "its scores see further than half of its own size: larger images cannot be compared with it"
    far = float(np.abs(scores - expected).max((0, 1))[untouched].max()) / max(float(np.ptp(expected)), 1e-12)
    if not far <= REORDERED_SUMS:
        raise DeployError(
            f"{name}: the freed model gives other scores where an image goes on beyond {_text((height, width))} "
            f"({far:.1e} of their range); {'; '.join(found.notes)}; please report the model"
        )
    return f"within a larger image it gives the same ({share:.0%} of the scores, out of reach of the edges)"


def _unseen(multiple: int, smallest: int, traced: tuple[int, int]) -> list[tuple[int, int]]:
    unit = multiple * -(-16 // multiple)
    odd = multiple if unit > multiple else 0
    least = multiple * ((smallest - 1) // multiple)
    sizes = [tuple(least + unit * side + odd * (side % 2) for side in pair) for pair in UNSEEN]
    return [size for size in sizes if size != traced]


def _runs(model: ModelProto) -> Callable[[np.ndarray], np.ndarray]:
    run, name = session(model.SerializeToString()), model.graph.input[0].name

    def scores(images: np.ndarray) -> np.ndarray:
        try:
            return run.run([model.graph.output[0].name], {name: images})[0]
        except Exception as error:
            text = f"{images.shape[2]}×{images.shape[3]}"
            raise DeployError(f"ONNX Runtime fails at {text}: {one_line(error)[:300]}") from error

    return scores


def _shapes(model: ModelProto, name: str) -> Callable[[int, int], tuple[int, ...]]:
    """For find_accepted_sizes."""
    import onnxruntime

    run, image = session(model.SerializeToString()), model.graph.input[0]
    quiet = onnxruntime.RunOptions()
    quiet.log_severity_level = FATAL_ONLY
    channels = dims(image)[1]
    if not isinstance(channels, int):
        raise DeployError(f"{name} takes images of {channels} channels, which is no fixed number; export it again")

    def shape(height: int, width: int) -> tuple[int, ...]:
        zeros = np.zeros((1, channels, height, width), np.float32)
        return run.run([model.graph.output[0].name], {image.name: zeros}, quiet)[0].shape

    return shape


def _text(size) -> str:
    return "×".join(map(str, size))


def export_free(
    path: str | os.PathLike,
    out: str | os.PathLike,
    options: "SourceOptions | None" = None,
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
    from fcn_deploy.export.importer.standard_form import read_source  # which uses this module

    source = read_source(path, options)
    model, card, name = source.model, source.card, str(path)
    if metadata(model, CARD_KEY) is None:
        end = find_end(model)
        padding, factor = end.padding, end.upsampling.factor
        multiple, smallest = (padding.multiple, padding.smallest) if padding is not None else (1, 1)
        stride = max(1, round(factor[0])) if factor else 1
        card = replace(card, size_multiple=multiple, smallest=smallest, stride=stride)
    run = _runs(model)
    for height, width in WRITTEN:
        scores = run(np.zeros((1, card.channels, height, width), np.float32))
        if scores.shape != (1, card.scores, height, width):
            raise DeployError(f"{name} gives {list(scores.shape)} for an image of {height}×{width}; please report it")
    ends = ((model.graph.input[0], "image", rename_reads), (model.graph.output[0], "logits", rename_result))
    # One of them may have the other's name.
    for value, called, rename in ends:
        aside = Names(model)(f"{called}/end")
        rename(model, value.name, aside)
        value.name = aside
    for value, called, rename in ends:
        free_name(model, called)
        rename(model, value.name, called)
        value.name = called
    set_shape(model.graph.input[0], ["N", card.channels, "H", "W"])
    set_shape(model.graph.output[0], ["N", card.scores, "H", "W"])
    model.producer_name = "fcn-deploy"
    set_metadata(model, CARD_KEY, card.to_json())
    if card.activation == "multilabel" and ends_in_sigmoid(model):
        set_metadata(model, ACTIVATED_KEY, "1")
    check(model, "the freed model")
    with replacing(out) as temporary:
        temporary.write_bytes(model.SerializeToString())
    return card, list(source.notes)
