"""What sizes a network takes, found by running it."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from fcn_deploy.export.analysis.trial_memory import TrialMemory
from fcn_deploy.runtime.errors import DeployError, one_line

# Sides that a network of some multiple takes: a multiple divides one of them, and is found among its divisors.
BASES = (96, 192, 320, 448, 768, 576, 800, 960)
SMALL_BASE = 32  # tried first: most networks take it, and their runs there cost a tenth
# What is run, in multiples beyond a side, to see whether it is taken: odd, even, not square.
NEIGHBOURS = ((0, 0), (0, 1), (2, 1))
# And once the multiple and the smallest side are found, of those whose sides are beyond it by so many pixels at most.
LARGER = ((4, 3), (10, 6))
LARGEST_SIDE = 1024
FATAL = 4  # ONNX Runtime's severity


def run_quietly(
    run, image: np.ndarray, outputs: Sequence[str] | None = None, in_part: bool = False
) -> list[np.ndarray]:
    """What a session of ONNX Runtime gives for an image; sizes that fail, as some must here, are not in its log.

    Args:
        run: the session.
        image: its one input.
        outputs: names of those that are wanted; None: all.
        in_part: run no more of the network than they need, whatever the rest does at this size.
    """
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.log_severity_level = FATAL
    options.only_execute_path_to_fetches = in_part
    return run.run(outputs, {run.get_inputs()[0].name: image}, options)


@dataclass(frozen=True)
class AcceptedSizes:
    """What sizes a network takes.

    Attributes:
        multiple: H and W must be multiples of it.
        smallest: least H and W, in pixels; 1 where all multiples are taken.
        factor: the scores are [N, K, ⌈H/factor⌉, ⌈W/factor⌉].
        scores: K; 0 where nothing was run.
        notes: what a user should know of it, a line each.
        by_choice: whether other sizes are taken too, and the user wants these multiples.
        only: (height, width) of the one size that it takes, or is to be given; None: it takes many.
    """

    multiple: int = 1
    smallest: int = 1
    factor: int = 1
    scores: int = 0
    notes: tuple[str, ...] = ()
    by_choice: bool = False
    only: tuple[int, int] | None = None


@dataclass(frozen=True)
class SizeTrial:
    """Of one run: the shape of its result, or why there is none.

    Attributes:
        shape: of the scores; () where the network fails.
        failure: in words; "" where it does not.
        nan: whether a score is not a number.
    """

    shape: tuple[int, ...] = ()
    failure: str = ""
    nan: bool = False


def try_size(run: Callable[[int, int], np.ndarray | Sequence[int]], height: int, width: int) -> SizeTrial:
    """What a network does with an image of a size; `run` as for find_accepted_sizes."""
    try:
        result = run(height, width)
    except Exception as error:  # of whatever runs it
        return SizeTrial(failure=_reason(error)[:300])
    shape = getattr(result, "shape", None)
    if shape is None:
        return SizeTrial(tuple(result))
    return SizeTrial(tuple(shape), nan=bool(np.isnan(np.asarray(result)).any()))


def only_at(run: "Run", name: str, size: tuple[int, int]) -> AcceptedSizes:
    """A network that is given images of one size (height, width) alone; arguments as for find_accepted_sizes.

    Raises:
        DeployError: it does not run at that size, or gives no scores for each of its pixels.
    """
    trial, (height, width) = try_size(run, *size), size
    if not trial.shape or trial.nan:
        said = (
            f"gives NaN at {height}×{width}" if trial.nan else f"fails at {height}×{width}: {trial.failure[:FAILURE]}"
        )
        raise DeployError(f"{name} {said}; name the size that it takes with --fit")
    factor = _factor(trial.shape, height, width)
    if not factor:
        raise DeployError(
            f"{name} gives {list(trial.shape)} for an image of {height}×{width}; a segmentation network gives scores "
            "[N,K,H,W], one for each pixel or at one whole share of both sides: name the size that it takes with --fit"
        )
    return AcceptedSizes(factor=factor, scores=trial.shape[1], only=size)


def size_that_runs(run: "Run", sizes: Iterable[tuple[int, int]]) -> tuple[int, int] | None:
    """The first of some sizes at which a network gives scores for the pixels of an image; None: it does at none."""
    for size in dict.fromkeys(sizes):
        trial = try_size(run, *size)
        if _factor(trial.shape, *size) and not trial.nan:
            return size
    return None


def _reason(error: Exception) -> str:
    """Why a network failed: of ONNX Runtime the node and what it says, without its source's lines."""
    text = one_line(error)
    if found := re.search(r"running (\w+) node\. Name:'([^']*)' Status Message: (.*)", text):
        operator, name, why = found.groups()
        why = re.sub(r"^/\S+:\d+ .*? was false\. ", "", why)
        return f"{operator} {name}: {why}" if name else f"{operator}: {why}"
    return f"{type(error).__name__}: {text}"


Run = Callable[[int, int], np.ndarray | Sequence[int]]


def find_accepted_sizes(run: Run, name: str) -> AcceptedSizes:
    """The sizes that a segmentation network takes, and how much smaller its output is; in 60 runs at most.

    A size is taken where the scores have the image's size, or that divided by one whole factor for both axes and
    rounded up, and are numbers. Sizes that are taken are multiples of one number from some number on; both are looked
    for apart, and tried. Sizes that would take more than 2 GB, or a quarter of what is free, are not.

    Args:
        run: (height, width) of an image of noise → the scores [N, K, h, w], or their shape alone; raises where the
            network does not take it.
        name: of the network, for errors.

    Raises:
        DeployError: it gives no scores [N, K, h, w], or takes no changing sizes; says what it did instead.
    """
    trials, tried = _Trials(run, name), set()
    for base in (SMALL_BASE, *BASES):
        like = trials.like(base)
        if like is None or not like.takes(base, 2 * base):  # a size baked in
            continue
        # Beside a size that is taken, the next is one multiple away.
        for multiple in _divisors(base):
            if multiple in tried or not like.takes(base + multiple, base + multiple):
                continue
            smallest = _smallest(like, multiple, base)
            larger = [pair for pair in LARGER if multiple * max(pair) <= LARGEST_SIDE]
            larger = [(y, x) for y, x in larger if trials.allows(smallest + multiple * y, smallest + multiple * x)]
            if like.takes_from(smallest, multiple) and like.takes_from(smallest, multiple, larger):
                least = smallest if smallest > multiple else 1
                return AcceptedSizes(multiple, least, like.factor, like.scores, _notes(like, multiple, smallest))
            tried.add(multiple)
    raise DeployError(_refusal(trials))


class _Trials:
    """What a network does at the sizes that were tried; each is run once.

    Attributes:
        name: of the network.
        seen: (height, width) → what came of it.
    """

    def __init__(self, run: Run, name: str) -> None:
        self._run, self.name, self._memory = run, name, TrialMemory()
        self.seen: dict[tuple[int, int], SizeTrial] = {}

    def allows(self, height: int, width: int) -> bool:
        """Whether a size may be tried: it was, or is expected to take no more memory than such runs may."""
        return (height, width) in self.seen or self._memory.allows(height * width)

    def at(self, height: int, width: int) -> SizeTrial:
        if not self.allows(height, width):
            needed = self._memory.expected(height * width)
            why = f"it would take about {needed / 1e9:.1f} GB, over the {self._memory.most / 1e9:.1f} GB of sizes tried"
            return self.seen.setdefault((height, width), SizeTrial(failure=why))
        if (height, width) not in self.seen:
            with self._memory.run(height * width):
                found = try_size(self._run, height, width)
            self.seen[height, width] = found
            if found.shape and len(found.shape) != 4:
                raise DeployError(
                    f"{self.name} gives {list(found.shape)}; a segmentation network gives scores [N,K,H,W] (a "
                    "classifier's dense layer after Flatten becomes a convolution by fcn_deploy.fcn.convolutionalize)"
                )
        return self.seen[height, width]

    def like(self, side: int) -> "_Like | None":
        """What an image of this side gives, as what others are to give; None where it gives no scores."""
        trial = self.at(side, side)
        factor = _factor(trial.shape, side, side)
        return _Like(self, factor, trial.shape[1]) if factor and not trial.nan else None


@dataclass(frozen=True)
class _Like:
    """Sizes are taken where a network gives so many scores, so many times smaller than the image."""

    trials: _Trials
    factor: int
    scores: int

    def takes(self, height: int, width: int) -> bool:
        found = self.trials.at(height, width)
        wanted = (self.scores, -(-height // self.factor), -(-width // self.factor))
        return found.shape[1:] == wanted and not found.nan

    def takes_from(self, side: int, multiple: int, beyond: Sequence[tuple[int, int]] = NEIGHBOURS) -> bool:
        """Whether sizes so many multiples beyond a side are taken."""
        return all(self.takes(side + multiple * rows, side + multiple * columns) for rows, columns in beyond)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _factor(shape: Sequence[int], height: int, width: int) -> int:
    """How many pixels of the image a cell of the scores is, along both axes; 0 where that is no one whole number."""
    if len(shape) != 4 or 0 in shape:
        return 0
    down = height // shape[2]
    return down if (shape[2] * down, shape[3] * down) == (height, width) else 0


def _smallest(like: _Like, multiple: int, base: int) -> int:
    """The least side that is taken, where all larger multiples are; `base` is."""
    if like.takes_from(multiple, multiple):
        return multiple
    low, high = 1, base // multiple  # in multiples; not taken, taken
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if like.takes_from(middle * multiple, multiple) else (middle, high)
    return high * multiple


def _notes(like: _Like, multiple: int, smallest: int) -> tuple[str, ...]:
    notes, name = [], like.trials.name
    nan = [size for size, found in like.trials.seen.items() if found.nan]
    if nan:
        height, width = min(nan)
        notes.append(f"{name} gives NaN at {height}×{width}; images are padded to {smallest}×{smallest} at least")
    # One number serves both axes, which is more padding than one of them may need.
    side = smallest + 2 * multiple
    primes = [number for number in _divisors(multiple) if len(_divisors(number)) == 2]
    for axis, what in ((0, "height"), (1, "width")):
        sizes = [(side + multiple // p, side)[:: 1 - 2 * axis] for p in primes]
        if any(like.takes(*size) for size in sizes):
            notes.append(f"{name} takes less than multiples of {multiple} in {what}; both axes are padded to them")
    return tuple(notes)


CAUSES = (  # what is said where a network fails → why
    (r"mat1 and mat2|MatMul|Gemm", "a dense layer after Flatten (fcn_deploy.fcn.convolutionalize makes a convolution)"),
    (
        r"size\(\)\[0\] ==|shape\[0\] to be",
        "an exported program of one batch size; export it with dynamic_shapes, N too",
    ),
    (r"[Gg]uard|Expected input .* to be", "an exported program of one size; export it with dynamic_shapes"),
    (r"size of tensor a|broadcast", "a tensor of one size, such as positions, is joined with the image's"),
    (r"missing .* required|positional argument", "it takes more than an image"),
    (
        r"'Tensor' object has no attribute",
        "it takes no image itself; wrap it in a module that takes [N,C,H,W]",
    ),
)
ONE_SIZE = "Usual cause: interpolate(size=<int>), or reshape to numbers"
MOST_ROUNDED = 32  # rows or columns that coarse maps leave out of a size
FAILURE = 150  # characters of what a library says


def _with_cause(failed: str) -> str:
    """A failure, cut short, and its usual cause where that is known."""
    cause = next((cause for words, cause in CAUSES if re.search(words, failed)), "")
    return failed[:FAILURE] + (f" (usual cause: {cause})" if cause else "")


def _refusal(trials: _Trials) -> str:
    """Why a network is not taken, from what it did at the sizes that were run."""
    text = f"{trials.name} labels no images of changing size: "
    # Small images fail for reasons of their own, which are told where there are no others.
    seen = sorted(trials.seen.items(), key=lambda trial: min(trial[0]) < BASES[0])
    ran = {size: found for size, found in seen if found.shape}
    failures = (f"at {h}×{w} it fails: {trial.failure}" for (h, w), trial in seen if trial.failure)
    failed = next(failures, "")
    if not ran:
        return text + _with_cause(failed)
    if all(found.nan for found in ran.values()):
        at = "×".join(map(str, next(iter(ran))))
        return (
            f"{text}it gives NaN wherever it runs, as at {at}, for noise around 0, as normalised pixels are: mend its "
            "weights, or the root or logarithm that it takes of what may be below 0"
        )
    if kept := _what_does_not_follow([found.shape for found in ran.values()]):
        return text + kept
    if lost := _lost_edges({size: found.shape for size, found in ran.items()}):
        return text + lost
    (height, width), shape = next((size, found.shape) for size, found in ran.items())
    if _factor(shape, height, width):
        return f"{text}it runs at {height}×{width}, and {_with_cause(failed) or 'not at twice that'}"
    return text + _no_factor(shape, height, width)


def _what_does_not_follow(shapes: Sequence[tuple[int, ...]]) -> str:
    """What is wrong with the shapes at several sizes, in words; "": nothing that is seen by them alone."""
    if len(shapes) < 2:
        return ""
    if len({shape[1] for shape in shapes}) > 1:
        return "the number of its scores changes with the image's size, as in [N,H,W,K]; mind its layout"
    kept = [len({shape[axis] for shape in shapes}) == 1 for axis in (2, 3)]
    if not any(kept):
        return ""
    what = "×".join(str(side) if same else "…" for side, same in zip(shapes[0][2:], kept, strict=True))
    return f"it gives {what} scores whatever the image's size. {ONE_SIZE}"


def _lost_edges(shapes: Mapping[tuple[int, int], Sequence[int]]) -> str:
    """That scores are fewer than pixels by about as many at every size, in words; "": they are not."""
    lost = [size[axis] - shape[2 + axis] for size, shape in shapes.items() for axis in (0, 1)]
    if len(shapes) < 2 or min(lost) < 1 or max(lost) - min(lost) >= MOST_ROUNDED:
        return ""
    (height, width), shape = next(iter(shapes.items()))
    side = -(-max(lost) // 2)
    return (
        f"it gives {shape[2]}×{shape[3]} scores for {height}×{width} pixels, {max(lost)} fewer a side at all sizes, as "
        f"convolutions without padding do; begin its forward with F.pad(x, ({side},) * 4, mode='reflect'), and crop "
        "its scores to the image"
    )


def _no_factor(shape: tuple[int, ...], height: int, width: int) -> str:
    """Why scores are not the image's, divided by one whole factor, in words."""
    where = f"{shape[2]}×{shape[3]} scores for {height}×{width} pixels"
    if shape[2] > height or shape[3] > width:
        return f"it gives {where}, and one for each at most is read"
    downs = [height / shape[2], width / shape[3]]
    if all(down == int(down) for down in downs):
        return f"it gives scores at 1/{downs[0]:g} of the height and 1/{downs[1]:g} of the width, not at one of both"
    return f"its output does not follow the size of the image: {where}. {ONE_SIZE}"
