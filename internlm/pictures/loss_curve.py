"""Loss curves of a run as an SVG picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

Points = Sequence[tuple[int, float]]  # (step, loss)

WIDTH, HEIGHT = 760, 420  # px: size of the picture
LEFT, RIGHT, TOP, BOTTOM = 56, 24, 64, 48  # px: margins around the axes
COLOURS = ("#2563eb", "#dc2626", "#059669", "#7c3aed", "#d97706")
DARK, GREY, GRID, FAINT = "#111827", "#6b7280", "#e5e7eb", 0.3
#: Weight of the previous average in the exponential average, which hides the noise of single steps.
SMOOTHING = 0.9


class _Axes(NamedTuple):
    """Ranges of the two axes: steps from left to right, losses from the bottom up."""

    first: float
    last: float
    low: float
    high: float

    def point(self, step: float, loss: float) -> str:
        """Return the position of a point in px, as ``"x,y"``."""
        x = LEFT + (WIDTH - LEFT - RIGHT) * (step - self.first) / (self.last - self.first)
        y = TOP + (HEIGHT - TOP - BOTTOM) * (self.high - loss) / (self.high - self.low)
        return f"{x:.1f},{y:.1f}"


def loss_curve(title: str, curves: Mapping[str, Points], marks: Mapping[str, Points], level: tuple[str, float]) -> str:
    """Draw the losses of a run over its steps, as SVG.

    Args:
        title: Heading of the picture.
        curves: Losses of every step, by name of the curve, drawn as a smoothed line over a faint line of raw losses.
        marks: Losses of some steps, such as validation losses, by name of the series, drawn as dots.
        level: Name and loss of a dashed, horizontal reference line.

    Returns:
        SVG text. Losses that are not finite are left out.

    Raises:
        ValueError: No loss is finite.
    """
    curves = {name: _finite(points) for name, points in curves.items()}
    marks = {name: _finite(points) for name, points in marks.items()}
    points = [point for series in (*curves.values(), *marks.values()) for point in series]
    if not points:
        raise ValueError("expected at least one finite loss to draw, got none")
    steps, losses = [step for step, _ in points], [*(loss for _, loss in points), level[1]]
    # A run of one step has no range of steps, so widen it: the axis divides by the range.
    axes = _Axes(min(steps), max(max(steps), min(steps) + 1), *_padded(min(losses), max(losses)))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" font-family="Helvetica, Arial, sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="24" font-size="15" font-weight="bold" fill="{DARK}">{escape(title)}</text>',
        *_grid(axes),
        *_legend([*curves, *marks, level[0]], len(curves), len(marks)),
        *_level(axes, level[1]),
    ]
    colours = dict(zip([*curves, *marks], _palette(), strict=False))
    for name, series in curves.items():
        lines += [_line(axes, series, colours[name], 1, FAINT), _line(axes, _smoothed(series), colours[name], 2, 1)]
    for name, series in marks.items():
        for step, loss in series:
            x, y = axes.point(step, loss).split(",")
            lines.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colours[name]}"><title>{loss:.4f}</title></circle>')
    return "\n".join([*lines, "</svg>", ""])


def _finite(points: Points) -> Points:
    return [(step, loss) for step, loss in points if math.isfinite(loss)]


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def _palette() -> Iterator[str]:
    while True:
        yield from COLOURS


def _smoothed(points: Points) -> Points:
    """Return the exponential moving average of the losses, with a bias correction as in Adam."""
    average, weight, smoothed = 0.0, 0.0, []
    for step, loss in points:
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append((step, average / weight))
    return smoothed


def _line(axes: _Axes, points: Points, colour: str, width: int, opacity: float) -> str:
    path = " ".join(axes.point(step, loss) for step, loss in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" opacity="{opacity:g}"/>'


def _grid(axes: _Axes) -> Iterator[str]:
    """Yield grid lines, the numbers on the axes, and the names of the axes."""
    for loss in _ticks(axes.low, axes.high):
        x, y = axes.point(axes.first, loss).split(",")
        yield f'<path d="M{x} {y}H{WIDTH - RIGHT}" stroke="{GRID}"/>'
        yield f'<text x="{LEFT - 8}" y="{y}" dy="4" text-anchor="end" fill="{GREY}">{loss:g}</text>'
    for step in filter(float.is_integer, _ticks(axes.first, axes.last)):  # a short run has ticks between whole steps
        x, _ = axes.point(step, axes.low).split(",")
        yield f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" fill="{GREY}">{step:g}</text>'
    yield f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 10}" text-anchor="end" fill="{GREY}">step</text>'
    yield f'<text x="8" y="{TOP - 10}" fill="{GREY}">nats per token</text>'


def _ticks(low: float, high: float) -> list[float]:
    """Return about six round numbers from ``low`` to ``high``."""
    rough = (high - low) / 6
    magnitude = 10.0 ** math.floor(math.log10(rough))
    distance = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough)
    first, last = math.ceil(low / distance), math.floor(high / distance)
    return [float(round(index * distance, 10)) for index in range(first, last + 1)]


def _legend(names: Sequence[str], curves: int, marks: int) -> Iterator[str]:
    x = LEFT + 100.0
    colours = [*(colour for _, colour in zip(range(curves + marks), _palette(), strict=False)), GREY]
    for index, (name, colour) in enumerate(zip(names, colours, strict=True)):
        if curves <= index < curves + marks:
            yield f'<circle cx="{x + 9:g}" cy="{TOP - 14}" r="3.5" fill="{colour}"/>'
        else:
            dashes = ' stroke-dasharray="5 4"' if index == len(names) - 1 else ""
            yield f'<path d="M{x:g} {TOP - 14}h18" stroke="{colour}" stroke-width="2"{dashes}/>'
        yield f'<text x="{x + 24:g}" y="{TOP - 10}" fill="{DARK}">{escape(name)}</text>'
        x += 24 + 6.6 * len(name) + 24  # px: a letter is about 6.6 wide


def _level(axes: _Axes, loss: float) -> Iterator[str]:
    x, y = axes.point(axes.first, loss).split(",")
    yield f'<path d="M{x} {y}H{WIDTH - RIGHT}" stroke="{GREY}" stroke-width="1.5" stroke-dasharray="5 4"/>'
