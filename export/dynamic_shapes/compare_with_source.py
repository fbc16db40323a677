"""Proves that a model whose sizes were freed is still the model: at its own size, and at sizes that it never had."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from fcn_deploy.export.analysis.accepted_sizes import AcceptedSizes, find_accepted_sizes, run_quietly
from fcn_deploy.export.analysis.batch_mixing import batch_mixer
from fcn_deploy.export.analysis.whole_extent import padded_to_one_size, padding_refusal, refuse_unseen_edges
from fcn_deploy.export.dynamic_shapes.free_sizes import FreedModel, free_sizes
from fcn_deploy.export.dynamic_shapes.solver import RemainsError
from fcn_deploy.export.dynamic_shapes.traced_graph import name_of_node
from fcn_deploy.export.graph.edit import clone, dims, set_shape
from fcn_deploy.export.tolerances import FREED_SIZES, REORDERED_SUMS
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.errors import DeployError, MisuseError, one_line
from onnx import ModelProto, NodeProto

# Where a freed model is run, in multiples of 16 pixels or of what it takes: not square, odd, small and larger.
UNSEEN = ((1, 2), (3, 1), (2, 5), (7, 3))
EDGES_SEEN_AT = (576, 640)  # (height, width) of an image whose edges are to count, larger than most are traced at
FACTORS, PADDED_BY = (1, 2, 4, 8, 16, 32), 17  # of a size that all are padded to, beyond the traced one
RUNS = 4  # at the traced size, that the comparison with a larger image takes as long as
SHARE_UNTOUCHED = 0.01  # of the scores must be out of reach of the edges for a larger image to tell anything

Run = Callable[[np.ndarray], np.ndarray]  # images [N,C,H,W] → scores [N,K,h,w]


class Known(NamedTuple):
    """What a model gave already, run without optimisation: a run at the size that it was traced at may be long.

    Attributes:
        images: float32 [N,C,H,W].
        scores: [N,K,h,w].
    """

    images: np.ndarray
    scores: np.ndarray


class Verified(NamedTuple):
    """A model whose sizes are free, as far as they were not.

    Attributes:
        model: float32 [N,C,H,W] → [N,K,h,w].
        notes: what was changed, a line each.
        multiple: that H and W must be of, whatever else runs: its padding was for such sizes.
        hidden: (height, width) that it was traced at, where its sizes had names all the same; None: as declared.
        scores: that it gives for the images of which some were known, run without optimisation; None: it was not run.
    """

    model: ModelProto
    notes: Sequence[str] = ()
    multiple: int = 1
    hidden: tuple[int, int] | None = None
    scores: np.ndarray | None = None


def free_and_verify(
    model: ModelProto,
    name: str,
    size: tuple[int, int] | None = None,
    assumed: Mapping[str, str] | None = None,
    seconds: float = math.inf,
    known: Known | None = None,
) -> Verified:
    """A model with free batch, height and width, verified.

    Args:
        model: float32 [N,C,H,W] → [N,K,h,w]; its sizes numbers, or names whether they hold or not.
        name: of the model, for notes and errors.
        size: (height, width) that it is known to run at, if any is.
        assumed: node → `fixed` or `global`: what the user says its numbers are.
        seconds, known: as of verify_freed.

    Raises:
        MisuseError: something is assumed of a node that there is not.
        DeployError: a size cannot be freed; names the node.
    """
    nodes = {name_of_node(node) for node in model.graph.node}
    if unknown := [node for node in assumed or () if node not in nodes]:
        raise MisuseError(f"--assume {unknown[0]}: {name} has no node of this name; take it from the note or the error")
    try:
        freed = free_sizes(model, size, assumed)
    except RemainsError as error:
        raise DeployError(f"{name}: {error}") from error
    except DeployError as error:
        # What has operators of its own, and names for all of its sizes, may well keep what the names promise.
        if all(isinstance(dim, int) for dim in (dims(model.graph.input[0])[place] for place in (0, 2, 3))):
            raise DeployError(f"{name}: {error}") from error
        try:
            accepted = find_accepted_sizes(_shape_at(model, name), name)
        except DeployError:
            raise DeployError(f"{name}: {error}") from error
        _refuse_hidden_size(model, name, accepted)
        return Verified(model)
    hidden: tuple[int, int] | None = None
    if freed.traced is None:
        held = padded_to_one_size(model, _channels(model, name))
        if held is None:
            return Verified(model, [f"{name}: {remark}" for remark in freed.remarks])
        model, freed = _free_from_padding(model, name, *held)
        assert freed.traced is not None
        hidden = freed.traced[1], freed.traced[2]
    if freed.batch_alone:
        found = _with_free_batch(model, freed, name)
        return found._replace(notes=[*found.notes, *(f"{name}: {remark}" for remark in freed.remarks)])
    notes = [f"{name}: size freed: {note}" for note in freed.notes]
    if not notes and freed.traced is not None:
        notes = [f"{name}: its size of {_text(freed.traced[1:])} is so by name alone, and freed"]
    seen, scores = verify_freed(model, freed, name, seconds, known if hidden is None else None)
    return Verified(freed.model, [*notes, f"{name}: {seen}"], freed.multiple, hidden, scores)


def _refuse_hidden_size(model: ModelProto, name: str, accepted: AcceptedSizes) -> None:
    """Raise DeployError where a model that cannot be followed, and runs at every size, looks at a part of the image."""
    if (held := padded_to_one_size(model, _channels(model, name))) is not None:
        raise padding_refusal(*held, name)
    height, width = (accepted.multiple * -(-side // accepted.multiple) for side in EDGES_SEEN_AT)
    image = np.random.default_rng(0).standard_normal((1, _channels(model, name), height, width), dtype=np.float32)
    refuse_unseen_edges(runner(model), image, name)


def _free_from_padding(
    model: ModelProto, name: str, pad: NodeProto, padded: tuple[int, int]
) -> tuple[ModelProto, FreedModel]:
    """A model whose sizes have names, and that brings every image to one size all the same, as of that size; and freed.

    Args:
        pad: the node that pads or crops to one size.
        padded: (height, width) that it comes to: the traced one, or a share of it, and "same" padding.

    Raises:
        DeployError: no size is found that it was traced at.
    """
    for factor in FACTORS:
        for more in range(PADDED_BY):
            size = tuple((side - more) * factor for side in padded)
            if min(size) < 1:
                break
            fixed = clone(model)
            set_shape(fixed.graph.input[0], ["N", _channels(model, name), *size])
            try:
                freed = free_sizes(fixed, (size[0], size[1]))
            except DeployError:
                continue
            if freed.notes:
                return fixed, freed
    raise padding_refusal(pad, padded, name)


def _with_free_batch(model: ModelProto, freed: FreedModel, name: str) -> Verified:
    """As free_and_verify, of a model whose H and W were free; one that takes an image at a time may stay so."""
    assert freed.traced is not None
    batch = freed.traced[0]
    try:
        seen = verify_batch(model, freed, name)
    except DeployError:
        if batch > 1:
            raise
        return Verified(model)
    notes = [f"{name}: batch freed: {note}" for note in freed.notes]
    if not notes:
        notes = [f"{name}: its batch of {batch} is so by name alone, and freed"]
    return Verified(freed.model, [*notes, f"{name}: {seen}"], freed.multiple)


def verify_batch(model: ModelProto, freed: FreedModel, name: str) -> str:
    """Compare a model of free H and W, whose batch was freed, with what it was made from; one line of what was seen.

    Both take the same sizes. At several, a batch has the scores that the model gives, and that its images have alone.

    Args:
        model: that has the batch baked in.
        freed: what free_sizes made of it, where it is `batch_alone`.
        name: of the model, for errors.

    Raises:
        DeployError: one of these does not hold.
    """
    assert freed.traced is not None
    count, channels = freed.traced[0], dims(model.graph.input[0])[1]
    before, after, random = runner(model), runner(freed.model), np.random.default_rng(0)
    accepted = find_accepted_sizes(_shape_at(model, name, count), name)
    if find_accepted_sizes(_shape_at(freed.model, name), name) != accepted:
        raise DeployError(f"{name}: with its batch freed it takes other sizes; please report the model")
    assert isinstance(channels, int), "as _shape_at found"
    sizes = _unseen(accepted.multiple, accepted.smallest, (0, 0))
    for height, width in sizes:
        images = random.standard_normal((count + 1, channels, height, width), dtype=np.float32)
        expected, scores, alone = before(images[:count]), after(images), after(images[count:])
        if scores[:count].shape != expected.shape or scores[count:].shape != alone.shape:
            raise DeployError(f"{name}: with its batch freed it gives scores of another shape at {height}×{width}")
        spread = max(float(np.ptp(expected)), 1e-12)
        apart = max(np.abs(scores[:count] - expected).max(), np.abs(scores[count:] - alone).max())
        if not apart <= REORDERED_SUMS * spread:
            raise DeployError(f"{name}: with its batch freed it gives other scores, as seen at {height}×{width}")
    return f"equal to the model with {count} image{'s' * (count > 1)} at once, at {len(sizes)} sizes"


def verify_freed(
    model: ModelProto, freed: FreedModel, name: str, seconds: float = math.inf, known: Known | None = None
) -> tuple[str, np.ndarray | None]:
    """Compare a freed model with what it was made from.

    Gives one line of what was seen, and what could not be; and its scores for the known images, where it was run.

    - At the traced size both give the same scores.
    - At sizes that neither ever saw it runs, its scores follow the image, and a batch gives what its images give.
    - Of an image that goes on beyond the traced one, what lies out of reach of the traced one's edges has its scores.

    Args:
        model: that has the sizes baked in.
        freed: what free_sizes made of it; its `traced` is known.
        name: of the model, for errors.
        seconds: that the larger image may take, by what the traced size took; it is left out where it takes longer.
        known: what `model` gives for some images; None: it is run.

    Raises:
        DeployError: one of these does not hold.
    """
    check = _Verification(model, freed, name, known)
    apart = check.at_traced_size()
    sizes, multiple = check.at_unseen_sizes()
    line = "exactly" if apart == 0 else f"up to {apart:.0e} of its scores' range"
    seen = (
        f"equal to the model at its own size of {_text(check.traced)}, {line}; it runs at {len(sizes)} unseen sizes "
        f"up to {_text(max(sizes))}; {check.within_a_larger_image(multiple, seconds)}"
    )
    return seen, check.of_known


class _Verification:
    """A model with a size baked in, and the same freed, side by side on images of noise."""

    def __init__(self, model: ModelProto, freed: FreedModel, name: str, known: Known | None) -> None:
        assert freed.traced is not None
        self.freed, self.name = freed, name
        batch, *_ = freed.traced
        self.traced = freed.traced[1:]  # (height, width)
        self.before, self.after = runner(model), runner(freed.model)
        self._random = np.random.default_rng(0)
        channels = dims(model.graph.input[0])[1]
        self._channels = channels if isinstance(channels, int) else 3
        self.image = self._noise(batch, *self.traced)
        self._known = known if known is not None and known.images.shape == self.image.shape else None
        self.of_known: np.ndarray | None = None
        self._seconds = 0.0  # that a run at the traced size takes

    @cached_property
    def expected(self) -> np.ndarray:
        """What the model gives at the size that it was traced at."""
        return self.before(self.image)

    @cached_property
    def spread(self) -> float:
        """Range of the scores."""
        return max(float(np.ptp(self.expected if self._known is None else self._known.scores)), 1e-12)

    def _noise(self, count: int, height: int, width: int) -> np.ndarray:
        return self._random.standard_normal((count, self._channels, height, width), dtype=np.float32)

    def at_traced_size(self) -> float:
        """How far apart both are at the traced size, as a share of the scores' range. Raises DeployError."""
        start = time.perf_counter()
        if self._known is not None:
            self.of_known = runner(self.freed.model, optimise=False)(self._known.images)
            self._seconds = time.perf_counter() - start
            if (apart := self._apart(self.of_known, self._known.scores)) <= FREED_SIZES:
                return apart
            self._known = None  # what came before the standard form may round otherwise
        expected = self.expected
        self._seconds = time.perf_counter() - start
        apart, name, traced = self._apart(self.after(self.image), expected), self.name, _text(self.traced)
        if apart == math.inf:
            raise DeployError(
                f"{name}: the freed model gives scores of another shape at its own size of {traced}; please report "
                "the model"
            )
        if not apart <= FREED_SIZES:
            raise DeployError(
                f"{name}: the freed model gives scores {apart:.1e} of their range away at its own size of {traced}; "
                "please report the model"
            )
        return apart

    def _apart(self, scores: np.ndarray, expected: np.ndarray) -> float:
        """How far apart scores are, as a share of their range; infinity: they are of another shape."""
        return float(np.abs(scores - expected).max()) / self.spread if scores.shape == expected.shape else math.inf

    def at_unseen_sizes(self) -> tuple[list[tuple[int, int]], int]:
        """(the sizes at which the freed model was run, the multiple that it takes). Raises DeployError."""
        freed, name = self.freed, self.name
        try:
            accepted = find_accepted_sizes(_shape_at(freed.model, name), name)
        except DeployError as error:
            raise DeployError(
                f"{error}. Its sizes were freed ({'; '.join(freed.notes)}), and something still holds"
            ) from error
        multiple, factor = math.lcm(accepted.multiple, freed.multiple), accepted.factor
        sizes = _unseen(multiple, accepted.smallest, self.traced)
        count = 1 if batch_mixer(freed.model) else 2
        for height, width in sizes:
            images = self._noise(count, height, width)
            scores = self.after(images)
            if scores.shape[2:] != (-(-height // factor), -(-width // factor)) or len(scores) != count:
                raise DeployError(
                    f"{name}: the freed model gives {list(scores.shape)} for {count} images of {height}×{width}; "
                    "please report it"
                )
            if count == 1:
                continue
            alone = self.after(images[1:])
            if not np.abs(scores[1:] - alone).max() <= REORDERED_SUMS * max(self.spread, float(np.ptp(alone))):
                raise DeployError(f"{name}: the freed model mixes the images of a batch, as seen at {height}×{width}")
        return sizes, multiple

    def within_a_larger_image(self, multiple: int, seconds: float) -> str:
        """Compare the scores of an image with those that it has as a part of a larger one; what was seen, in words.

        It is not compared where that would take longer than `seconds`.

        Raises DeployError where they differ out of reach of the edges.
        """
        if RUNS * self._seconds > seconds:
            return "larger images are not compared with it, which would take long (inspect-model --thorough does)"
        if self.freed.size_dependent:
            self._look_at_edges(multiple)
            return (
                f"its scores depend on the image's size by {self.freed.size_dependent}: larger images cannot be "
                "compared with it"
            )
        untouched = self._out_of_reach()
        share = float(untouched.mean())
        if share < SHARE_UNTOUCHED:
            self._look_at_edges(multiple)
            return "its scores see further than half of its own size: larger images cannot be compared with it"
        height, width = self.traced
        rows, columns = (multiple * max(1, side // (multiple * part)) for side, part in ((height, 2), (width, 3)))
        larger = self._noise(len(self.image), height + rows, width + columns)
        larger[:, :, :height, :width] = self.image
        scores = self.after(larger)[:, :, : self.expected.shape[2], : self.expected.shape[3]]
        apart = float(np.abs(scores - self.expected).max((0, 1))[untouched].max()) / self.spread
        if not apart <= REORDERED_SUMS:
            raise DeployError(
                f"{self.name}: the freed model gives other scores where an image goes on beyond {_text(self.traced)} "
                f"({apart:.1e} of their range); {'; '.join(self.freed.notes)}; please report the model"
            )
        return f"within a larger image it gives the same ({share:.0%} of the scores, out of reach of the edges)"

    def _look_at_edges(self, multiple: int) -> None:
        """Raise DeployError where the edges of an image of twice the traced size do not count."""
        height, width = (multiple * max(1, 2 * side // multiple) for side in self.traced)
        refuse_unseen_edges(self.after, self._noise(1, height, width), self.name)

    def _out_of_reach(self) -> np.ndarray:
        """Which cells of the scores, bool [h,w], do not depend on the half of the image at right and below.

        They do not see what lies beyond these either. Those that are the same for every image, such as padding, tell
        nothing. What is right of and below a cell that depends on that half is within reach too, whether or not it
        changed: of cells that are mostly zeros, as unpooling leaves them, some do not.
        """
        count, (height, width) = len(self.image), self.traced
        telling = (self.before(self._noise(count, height, width)) != self.expected).any((0, 1))
        touched = np.zeros_like(telling)
        for strength in (1, 3):
            changed = strength * self._noise(count, height, width)
            changed[:, :, : height // 2, : width // 2] = self.image[:, :, : height // 2, : width // 2]
            touched |= (self.before(changed) != self.expected).any((0, 1))
        return telling & ~np.logical_or.accumulate(np.logical_or.accumulate(touched, 0), 1)


def _unseen(multiple: int, smallest: int, traced: tuple[int, int]) -> list[tuple[int, int]]:
    unit = multiple * -(-16 // multiple)
    odd = multiple if unit > multiple else 0
    least = multiple * ((smallest - 1) // multiple)
    sizes = [(least + unit * rows + odd * (rows % 2), least + unit * cols + odd * (cols % 2)) for rows, cols in UNSEEN]
    return [size for size in sizes if size != traced]


def runner(model: ModelProto, optimise: bool = True) -> Run:
    """A model as a function of images, which raises DeployError with what ONNX Runtime says."""
    # Large images that are run a few times are not to keep what they took.
    run, name = session(model.SerializeToString(), optimise=optimise, arena=False), model.graph.input[0].name

    def scores(images: np.ndarray) -> np.ndarray:
        try:
            return run.run([model.graph.output[0].name], {name: images})[0]
        except Exception as error:
            text = f"{images.shape[2]}×{images.shape[3]}"
            raise DeployError(f"ONNX Runtime fails at {text}: {one_line(error, 300)}") from error

    return scores


def _shape_at(model: ModelProto, name: str, count: int = 1) -> Callable[[int, int], tuple[int, ...]]:
    """The shape of a model's scores for `count` images of (height, width), for find_accepted_sizes."""
    run, channels = session(model.SerializeToString(), arena=False), _channels(model, name)

    def shape(height: int, width: int) -> tuple[int, ...]:
        zeros = np.zeros((count, channels, height, width), np.float32)
        return run_quietly(run, zeros, [model.graph.output[0].name])[0].shape

    return shape


def _channels(model: ModelProto, name: str) -> int:
    channels = dims(model.graph.input[0])[1]
    if not isinstance(channels, int):
        raise DeployError(f"{name} takes images of {channels} channels, which is no fixed number; export it again")
    return channels


def _text(size: Sequence[int]) -> str:
    return "×".join(map(str, size))
