"""Sizes as functions of the image's: a size is its numbers for five sample images, so that it tells what it follows.

The samples are the image as it was traced, a larger batch, a taller image, a wider one, and one that is all three.
Sizes with the same five numbers are one and the same function of the image's size. An axis is its factors, outermost
first: (h, w) where a map was flattened row by row, () where it is 1.
"""

import math
from collections.abc import Iterable, Mapping

SampledSize = tuple[int, ...]
Axis = tuple[SampledSize, ...]
Shape = tuple[Axis, ...]

SAMPLES = 5
LETTERS = "NHW"  # the sample in which each of them alone has changed is its place here plus one
PERIOD = 64  # images grow by multiples of this, and of what was traced: what divided evenly then does so again


def fixed(number: int) -> SampledSize:
    """A size that does not change with the image."""
    return (int(number),) * SAMPLES


def is_fixed(size: SampledSize) -> bool:
    return len(set(size)) == 1


def changes_with(size: SampledSize) -> str:
    """The letters of N, H and W that a size changes with."""
    return "".join(letter for index, letter in enumerate(LETTERS) if size[index + 1] != size[0])


def is_sum(size: SampledSize) -> bool:
    """Whether a size changes with H and W, by each whatever the other is, as what is put together of both does."""
    traced, _, taller, wider, both = size
    return changes_with(size) == "HW" and 2 * (both - traced) == 6 * (taller - traced) + (wider - traced)


def multiplied(sizes: Iterable[SampledSize]) -> SampledSize:
    return tuple(math.prod(numbers) for numbers in zip(fixed(1), *sizes, strict=True))


def added(sizes: Iterable[SampledSize]) -> SampledSize:
    return tuple(sum(numbers) for numbers in zip(fixed(0), *sizes, strict=True))


def scaled(size: SampledSize, above: int, below: int) -> SampledSize | None:
    """size · above / below; None where that is not a whole number for every sample."""
    if below <= 0 or any(number * above % below for number in size):
        return None
    return tuple(number * above // below for number in size)


def axis_of(size: SampledSize) -> Axis:
    return () if set(size) == {1} else (size,)


def fixed_shape(shape: Iterable[int]) -> Shape:
    """The shape of a constant."""
    return tuple(axis_of(fixed(number)) for number in shape)


def axis_sizes(shape: Shape) -> list[SampledSize]:
    return [multiplied(factors) for factors in shape]


def sample_sizes(batch: int, height: int, width: int) -> tuple[SampledSize, SampledSize, SampledSize]:
    """N, H and W of the five samples, of which the first is the traced image."""
    down, right = math.lcm(PERIOD, height), math.lcm(PERIOD, width)
    return (
        (batch, 3 * batch, batch, batch, 2 * batch),
        (height, height, height + down, height, height + 3 * down),
        (width, width, width, width + 2 * right, width + right),
    )


def describe(size: SampledSize, image: Mapping[str, SampledSize]) -> str:
    """A size in words, such as H/8, H·W/64, 2·N or 24; `image`: the sizes N, H and W."""
    if is_fixed(size):
        return str(size[0])
    letters = changes_with(size)
    whole = multiplied(image[letter] for letter in letters)
    ratio = size[0] / whole[0]
    name = "·".join(letters)
    for above in range(1, 9) if ratio else ():
        below = round(above / ratio)
        if below >= 1 and scaled(whole, above, below) == size:
            return f"{above}·{name}" * (above > 1) + name * (above == 1) + f"/{below}" * (below > 1)
    for below in range(1, 65):
        gaps = {number - side // below for number, side in zip(size, whole, strict=True)}
        if len(gaps) == 1:
            return f"{name}{f'/{below}' if below > 1 else ''}{gaps.pop():+d}"
    return f"{size[0]} (by {name})"
