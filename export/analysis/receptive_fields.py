"""What the cells of a tensor depend on in the image, along each axis."""

import math
from dataclasses import dataclass, replace
from fractions import Fraction

PLACES = ("H", "W")
TILES_DOMAIN, STRETCH = "fcn_deploy.tiles", "Stretch"  # an operator of ours: see export/passes/open_pooling.py
NCHW = ("N", "C", "H", "W")
Number = Fraction | int  # exact; whole ones as int, whose arithmetic takes a tenth of the time


class WholeImageError(Exception):
    """The network cannot be tiled; the text is the operator that looks at the whole image, or may."""


@dataclass(frozen=True)
class Field:
    """What a tensor's cells depend on along one axis, in pixels of the image.

    Attributes:
        stride: pixels from one cell to the next.
        low, high: cell i depends on the pixels stride·i + low … stride·i + high. They hold the cell's own place,
            stride·i … stride·(i + 1) - 1, so that a cell outside a tile never has its field inside.
        period: the image may be moved by this many pixels, and all that is computed moves by whole cells.
    """

    stride: Number = 1
    low: Number = 0
    high: Number = 0
    period: int = 1

    def read_by(self, step: Number, first: Number, last: Number) -> "Field":
        """Of an operator whose output cell j reads the cells step·j + first … step·j + last of this."""
        stride = _plain(self.stride * step)
        low = _plain(min(self.low + self.stride * first, 0))
        high = _plain(max(self.high + self.stride * last, stride - 1))
        # The smallest multiple of the period that is a whole number of the new cells.
        cells = stride.numerator // math.gcd(self.period * stride.denominator, stride.numerator)
        return Field(stride, low, high, self.period * cells)

    def joined(self, other: "Field") -> "Field":
        """Of cells that depend on those of both, which are of one stride."""
        low, high = min(self.low, other.low), max(self.high, other.high)
        return Field(self.stride, low, high, math.lcm(self.period, other.period))


def _plain(number: Number) -> Number:
    return number.numerator if number.denominator == 1 else number


Fields = tuple[Field, Field]  # vertical and horizontal
OF_IMAGE: Fields = (Field(), Field())  # of the image itself, whose cells are its pixels


@dataclass(frozen=True)
class FeatureMap:
    """A tensor with places of the image in it.

    Attributes:
        fields: vertical and horizontal.
        layout: what each of its dimensions is: N, H, W; C for channels, and for whatever has no place in the image.
    """

    fields: Fields
    layout: tuple[str, ...] = NCHW

    @property
    def rank(self) -> int:
        return len(self.layout)

    @property
    def period(self) -> int:
        """Of both axes together."""
        return math.lcm(*(field.period for field in self.fields))

    def read_by(self, place: str, step: Number, first: Number, last: Number) -> "FeatureMap":
        """As Field.read_by, along H or W."""
        rows, columns = self.fields
        if place == "H":
            rows = rows.read_by(step, first, last)
        else:
            columns = columns.read_by(step, first, last)
        return replace(self, fields=(rows, columns))

    def without(self, axes: list[int]) -> "FeatureMap":
        """Without some of its dimensions."""
        return replace(self, layout=tuple(label for axis, label in enumerate(self.layout) if axis not in axes))
