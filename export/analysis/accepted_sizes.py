"""What sizes a network takes, found by running it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from fcn_deploy.runtime.backends.onnxruntime import one_line
from fcn_deploy.runtime.errors import DeployError

# Sides that a network of some multiple takes: a multiple divides one of them, and is found among its divisors.
BASES = (192, 320, 448, 768, 576, 800, 960)
# What is run, in multiples beyond a side, to see whether it is taken; and once both are found. Odd, even, not square.
NEIGHBOURS = ((0, 0), (0, 1), (2, 1))
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
        factor: the scores are [N, K, H/factor, W/factor].
        scores: K; 0 where nothing was run.
        notes: what a user should know of it, a line each.
    """

    multiple: int = 1
    smallest: int = 1
    factor: int = 1
    scores: int = 0
    notes: tuple[str, ...] = ()


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


def _reason(error: Exception) -> str:
    """Why a network failed: of ONNX Runtime the node and what it says, without its source's lines."""
    text = one_line(error)
    if found := re.search(r"running (\w+) node\. Name:'([^']*)' Status Message: (.*)", text):
        operator, name, why = found.groups()
        why = re.sub(r"^/\S+:\d+ .*? was false\. ", "", why)
        return f"{operator} {name}: {why}" if name else f"{operator}: {why}"
    return f"{type(error).__name__}: {text}"


def find_accepted_sizes(run: Callable[[int, int], np.ndarray | Sequence[int]], name: str) -> AcceptedSizes:
    """The sizes that a segmentation network takes, and how much smaller its output is; in 60 runs at most.

    A size is taken where the scores have the image's size, or that divided by one whole factor for both axes, and are
    numbers. Sizes that are taken are multiples of one number from some number on; both are looked for apart, and tried.

    Args:
        run: (height, width) of an image of noise → the scores [N, K, h, w], or their shape alone; raises where the
            network does not take it.
        name: of the network, for errors.

    Raises:
        DeployError: it gives no scores [N, K, h, w], or takes no changing sizes; says what it did instead.
    """
    seen: dict[tuple[int, int], SizeTrial] = {}

    def at(height: int, width: int) -> SizeTrial:
        if (height, width) not in seen:
            found = seen[height, width] = try_size(run, height, width)
            if found.shape and len(found.shape) != 4:
                raise DeployError(
                    f"{name} gives {list(found.shape)}; a segmentation network gives scores [N,K,H,W] (a classifier's "
                    "dense layer after Flatten becomes a convolution by fcn_deploy.fcn.convolutionalize)"
                )
        return seen[height, width]

    tried: list[int] = []
    for base in BASES:
        start = at(base, base)
        if start.nan or not start.shape or not (factor := _factor(start.shape, base, base)):
            continue

        def takes(height: int, width: int, start=start, factor=factor) -> bool:
            found = at(height, width)
            return (
                not found.nan and found.shape[1:2] == start.shape[1:2] and _factor(found.shape, height, width) == factor
            )

        if not takes(base, 2 * base):  # a size baked in
            continue
        # Beside a size that is taken, the next is one multiple away.
        for multiple in _divisors(base):
            if multiple in tried or not takes(base + multiple, base + multiple):
                continue

            def fits(side: int, beyond=NEIGHBOURS, multiple=multiple, takes=takes) -> bool:
                return all(takes(side + multiple * rows, side + multiple * columns) for rows, columns in beyond)

            smallest = _smallest(fits, multiple, base)
            if fits(smallest) and fits(smallest, [pair for pair in LARGER if multiple * max(pair) <= LARGEST_SIDE]):
                notes = _notes(seen, takes, multiple, smallest, name)
                least = smallest if smallest > multiple else 1
                return AcceptedSizes(multiple, least, factor, start.shape[1], notes)
            tried.append(multiple)
    raise DeployError(_refusal(seen, name))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _factor(shape: Sequence[int], height: int, width: int) -> int:
    """How many pixels of the image a cell of the scores is, along both axes; 0 where that is no one whole number."""
    if len(shape) != 4 or 0 in shape:
        return 0
    down = height // shape[2]
    return down if (shape[2] * down, shape[3] * down) == (height, width) else 0


def _smallest(fits: Callable[[int], bool], multiple: int, base: int) -> int:
    """The least side that is taken, where all larger multiples are; `base` is."""
    if fits(multiple):
        return multiple
    low, high = 1, base // multiple  # in multiples; not taken, taken
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle * multiple) else (middle, high)
    return high * multiple


def _notes(seen: dict[tuple[int, int], SizeTrial], takes, multiple: int, smallest: int, name: str) -> tuple[str, ...]:
    notes = []
    nan = [size for size, found in seen.items() if found.nan]
    if nan:
        height, width = min(nan)
        notes.append(f"{name} gives NaN at {height}×{width}; images are padded to {smallest}×{smallest} at least")
    # One number serves both axes, which is more padding than one of them may need.
    side = smallest + 2 * multiple
    primes = [number for number in _divisors(multiple) if len(_divisors(number)) == 2]
    for axis, what in ((0, "height"), (1, "width")):
        sizes = [(side + multiple // p, side)[:: 1 - 2 * axis] for p in primes]
        if any(takes(*size) for size in sizes):
            notes.append(f"{name} takes less than multiples of {multiple} in {what}; both axes are padded to them")
    return tuple(notes)


def _refusal(seen: dict[tuple[int, int], SizeTrial], name: str) -> str:
    """Why a network is not taken, from what it did at the sizes that were run."""
    causes = (
        "Usual causes: a dense layer after Flatten (see fcn_deploy.fcn.convolutionalize), or interpolate(size=<int>)"
    )
    text = f"{name} labels no images of changing size (multiples of 1 to {max(BASES)} were tried): "
    ran = {size: found for size, found in seen.items() if found.shape}
    failed = next((f"at {h}×{w} it fails: {found.failure}" for (h, w), found in seen.items() if found.failure), "")
    if not ran:
        return f"{text}{failed}. {causes}"
    if all(found.nan for found in ran.values()):
        return f"{text}it gives NaN wherever it runs, as at {'×'.join(map(str, next(iter(ran))))}: mend its weights"
    (height, width), shape = next((size, found.shape) for size, found in ran.items())
    if len(ran) > 1 and len({found.shape[1] for found in ran.values()}) > 1:
        return f"{text}the number of its scores changes with the image's size, as in [N,H,W,K]; mind its layout"
    if len(ran) > 1:
        kept = [len({found.shape[2 + axis] for found in ran.values()}) == 1 for axis in (0, 1)]
        if any(kept):
            what = "×".join(str(side) if same else "…" for side, same in zip(shape[2:], kept, strict=True))
            return f"{text}it gives {what} scores whatever the image's size. {causes}"
    if _factor(shape, height, width):
        return f"{text}it runs at {height}×{width}, and {failed or 'not at twice that'}. {causes}"
    where = f"{shape[2]}×{shape[3]} scores for {height}×{width} pixels"
    if shape[2] > height or shape[3] > width:
        return f"{text}it gives {where}, and one for each at most is read"
    downs = [height / shape[2], width / shape[3]]
    if all(down == int(down) for down in downs):
        return (
            f"{text}it gives scores at 1/{downs[0]:g} of the height and 1/{downs[1]:g} of the width, not at one of both"
        )
    return f"{text}its output does not follow the size of the image: {where}. {causes}"
