"""Line charts as inline SVG: no script, no font and no file of its own, colours by the page's style sheet."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markupsafe import Markup

WIDTH, HEIGHT = 560, 320  # of the drawing's own units; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 12, 52
COLOURS = 8  # that the style sheet names, s0 to s7


@dataclass(frozen=True)
class Series:
    """Points joined by a line.

    Attributes:
        name: as the legend says it.
        points: (x, y), in order of x.
        colour: index of a class of the style sheet.
        dashed: a second kind of line in the same colour.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    colour: int = 0
    dashed: bool = False


def line_chart(
    series: Sequence[Series],
    title: str,
    x_label: str,
    y_label: str,
    *,
    log: bool = False,
    x_ticks: Sequence[float] = (),
) -> "Markup":
    """A chart with axes, grid, markers and a title that screen readers read: Markup.

    Args:
        series: with at least one point in all.
        title: what it shows.
        x_label, y_label: of the axes, with their units.
        log: both axes are logarithmic, and all values above 0; otherwise x alone is.
        x_ticks: values of x to name; none: chosen.
    """
    from markupsafe import Markup

    xs = [x for one in series for x, _ in one.points] + list(x_ticks)
    ys = [y for one in series for _, y in one.points]
    x_ticks, y_ticks = x_ticks or log_ticks(min(xs), max(xs)), log_ticks(min(ys), max(ys)) if log else linear_ticks(ys)
    digits = max(len(f"{tick:g}".partition(".")[2]) for tick in y_ticks)
    place_x = _scale(min(*xs, *x_ticks), max(*xs, *x_ticks), LEFT, WIDTH - RIGHT, log=True)
    place_y = _scale(min(*ys, *y_ticks), max(*ys, *y_ticks), HEIGHT - BOTTOM, TOP, log=log)
    parts = []
    for tick in x_ticks:
        x = place_x(tick)
        parts += [
            Markup('<line class="grid" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(x, TOP, HEIGHT - BOTTOM),
            Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(x, HEIGHT - BOTTOM + 18, f"{tick:g}"),
        ]
    for tick in y_ticks:
        y, name = place_y(tick), f"{tick:g}" if log else f"{tick:.{digits}f}"
        parts += [
            Markup('<line class="grid" y1="{0}" y2="{0}" x1="{1}" x2="{2}"/>').format(y, LEFT, WIDTH - RIGHT),
            Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(LEFT - 6, y + 4.5, name),
        ]
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts += [
        Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
            (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label
        ),
        Markup('<text transform="translate(14 {}) rotate(-90)" text-anchor="middle">{}</text>').format(middle, y_label),
    ]
    for place, one in enumerate(series):
        placed = [(place_x(x), place_y(y)) for x, y in one.points]
        line = " ".join(f"{x},{y}" for x, y in placed)
        # Where lines lie on each other the earlier one still shows around the later.
        width = 2 if len(series) == 1 else round(5 - 3 * place / (len(series) - 1), 1)
        style = f"s{one.colour % COLOURS}{' dashed' if one.dashed else ''}"
        parts.append(
            Markup('<g class="{}"><title>{}</title><polyline points="{}" stroke-width="{}"/>{}</g>').format(
                style, one.name, line, width, Markup("").join(_marker(one, x, y) for x, y in placed)
            )
        )
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, title, Markup("").join(parts)
    )


def key(one: Series) -> "Markup":
    """A line and a marker as in the chart, for the legend: Markup."""
    from markupsafe import Markup

    return Markup(
        '<svg class="key {}{}" viewBox="0 0 30 12" aria-hidden="true">'
        '<polyline points="1,6 29,6" stroke-width="2"/>{}</svg>'
    ).format(f"s{one.colour % COLOURS}", " dashed" if one.dashed else "", _marker(one, 15, 6))


def _marker(one: Series, x: float, y: float) -> "Markup":
    """Shapes tell the lines apart where colours do not."""
    from markupsafe import Markup

    shape = one.colour % 4
    if shape == 0:
        return Markup('<circle cx="{}" cy="{}" r="3.5"/>').format(x, y)
    corners = {
        1: ((-3.5, -3.5), (3.5, -3.5), (3.5, 3.5), (-3.5, 3.5)),
        2: ((0, -4.5), (4.5, 3.5), (-4.5, 3.5)),
        3: ((0, -5), (5, 0), (0, 5), (-5, 0)),
    }[shape]
    return Markup('<polygon points="{}"/>').format(" ".join(f"{round(x + a, 1)},{round(y + b, 1)}" for a, b in corners))


def _scale(low: float, high: float, start: float, end: float, log: bool) -> Callable[[float], float]:
    """Value → coordinate, to a tenth of a unit. A single value lies in the middle."""
    if log:
        low, high = math.log(low), math.log(high)

    def place(value: float) -> float:
        value = math.log(value) if log else value
        share = (value - low) / (high - low) if high > low else 0.5
        return round(start + share * (end - start), 1)

    return place


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten around low to high; powers of ten alone where that is many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [float(f"{step}e{power}") for power in range(first, last + 1) for step in steps]
    inside = [tick for tick in ticks if low <= tick <= high]
    below, above = max((t for t in ticks if t < low), default=None), min((t for t in ticks if t > high), default=None)
    return [t for t in (below, *inside, above) if t is not None]


def linear_ticks(values: Sequence[float]) -> list[float]:
    """Four to seven round numbers around the values."""
    low, high = min(values), max(values)
    span = max(high - low, 1e-3)
    unit = 10.0 ** math.floor(math.log10(span / 4))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if span / (unit * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if first == last:
        first, last = first - 1, last + 1
    return [round(index * step, 12) for index in range(first, last + 1)]
