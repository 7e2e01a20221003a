"""Plots as SVG text: no script, no font, nothing loaded. A page that shows them has PLOT_STYLE; `page` makes a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 14, 42

FEW = 12
"""Points of a line that are marked one by one, if there are no more."""

CAPTION = 26
"""Pixels above a plot in a file of plots."""

PLOT_STYLE = """
:root { --ink: #1b1f24; --dim: #667079; --rule: #e3e6e9; --c0: #2563b0; --c1: #c2571a; --c2: #2c8a4b; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --dim: #98a2ab; --rule: #2d333a; --c0: #6aa5ec; --c1: #ec9459; --c2: #6cc68a; }
}
.grid { stroke: var(--rule); } .tick, .axis, .legend { font-size: 11px; fill: var(--dim); }
.s0, .s1, .s2 { fill: none; stroke-width: 2; stroke-linejoin: round; } .dot { opacity: .55; }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); }
.f0 { fill: var(--c0); } .f1 { fill: var(--c1); } .f2 { fill: var(--c2); }
"""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Points of one colour, in order of x."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Axis:
    """What a direction of a plot says."""

    title: str
    log: bool = False
    show: Callable[[float], str] = lambda value: f"{value:g}"


@dataclass(frozen=True)
class Scale:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, log: bool) -> Scale:
        if log:
            positive = [value for value in values if value > 0] or [1.0]
            low, high = min(positive), max(positive)
            return cls(low, high if high > low else low * 10, start, end, True)
        high = max([*values, 0.0])
        return cls(0.0, high or 1.0, start, end, False)

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Five or so round values."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            marks = (1, 2, 5) if last - first < 4 else (1,)
            values = [mark * 10.0**power for power in range(first, last + 1) for mark in marks]
            return [value for value in values if self.low * 0.999 <= value <= self.high * 1.001]
        step = _round_step((self.high - self.low) / 5)
        return [n * step for n in range(int(self.high / step + 1e-9) + 1)]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(mark * power for mark in (1, 2, 5, 10) if mark * power >= rough * 0.999)


def lines(series: Sequence[Series], x: Axis, y: Axis) -> str:
    """A line a series."""
    return _plot(series, x, y, _line)


def dots(series: Sequence[Series], x: Axis, y: Axis) -> str:
    """A cloud a series."""
    return _plot(series, x, y, _cloud)


def bars(names: Sequence[str], values: Sequence[float], y: Axis) -> str:
    """A bar a name; names are shown while there is room for them, and all of them where the mouse is."""
    scale = Scale.over(values, HEIGHT - BOTTOM, TOP, False)
    width = (WIDTH - LEFT - RIGHT) / max(1, len(values))
    parts = [_y_axis(scale, y)]
    every = max(1, math.ceil(len(names) / 16))
    for number, (name, value) in enumerate(zip(names, values, strict=True)):
        at, top = LEFT + number * width, scale(value)
        title = f"<title>{escape(name)}: {escape(y.show(value))}</title>"
        body = f'width="{max(1.0, width - 2):.1f}" height="{HEIGHT - BOTTOM - top:.1f}" rx="2" class="f0"'
        parts.append(f'<rect x="{at + 1:.1f}" y="{top:.1f}" {body}>{title}</rect>')
        if number % every == 0:
            middle = at + width / 2
            place = (
                f'x="{middle:.1f}" y="{HEIGHT - BOTTOM + 14}" transform="rotate(28 {middle:.1f} {HEIGHT - BOTTOM + 8})"'
            )
            parts.append(f'<text {place} class="tick">{escape(name)}</text>')
    return _svg(parts)


def _plot(series: Sequence[Series], x: Axis, y: Axis, draw: Callable[[int, list[Point]], str]) -> str:
    points = [point for each in series for point in each.points]
    across = Scale.over([point[0] for point in points], LEFT, WIDTH - RIGHT, x.log)
    up = Scale.over([point[1] for point in points], HEIGHT - BOTTOM, TOP, y.log)
    parts = [_y_axis(up, y), _x_axis(across, x)]
    for number, each in enumerate(series):
        placed = [(across(point[0]), up(point[1])) for point in each.points]
        parts.append(f"<g><title>{escape(each.name)}</title>{draw(number, placed)}</g>")
    if len(series) > 1:
        begins = [up(each.points[0][1]) for each in series if each.points]
        high = bool(begins) and sum(begins) / len(begins) < (TOP + HEIGHT - BOTTOM) / 2  # there the legend is not
        top = HEIGHT - BOTTOM - 16 * len(series) - 8 if high else TOP + 8
        parts += [_legend(top + 16 * number, number, each.name) for number, each in enumerate(series)]
    return _svg(parts)


def _line(number: int, points: list[Point]) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    marks = _cloud(number, points).replace(" dot", "") if len(points) <= FEW else ""
    return f'<polyline points="{path}" class="s{number}"/>{marks}'


def _cloud(number: int, points: list[Point]) -> str:
    return "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" class="f{number} dot"/>' for x, y in points)


def _legend(y: float, number: int, name: str) -> str:
    key = f'<rect x="{LEFT + 12}" y="{y - 7}" width="12" height="4" rx="2" class="f{number}"/>'
    return f'{key}<text x="{LEFT + 30}" y="{y - 1}" class="legend">{escape(name)}</text>'


def _x_axis(scale: Scale, axis: Axis) -> str:
    floor = HEIGHT - BOTTOM
    place = f'y="{floor + 16}" class="tick" text-anchor="middle"'
    ticks = "".join(f'<text x="{scale(v):.1f}" {place}>{escape(axis.show(v))}</text>' for v in scale.ticks())
    title = f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" class="axis" text-anchor="middle">'
    return f"{ticks}{title}{escape(axis.title)}</text>"


def _y_axis(scale: Scale, axis: Axis) -> str:
    parts = []
    for value in scale.ticks():
        y = scale(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        label = escape(axis.show(value))
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="tick" text-anchor="end">{label}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    place = f'x="14" y="{middle}" transform="rotate(-90 14 {middle})" text-anchor="middle"'
    return "".join(parts) + f'<text {place} class="axis">{escape(axis.title)}</text>'


def _svg(parts: Sequence[str]) -> str:
    # the namespace is left out: inside of an HTML page it is understood
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def page(plots: Mapping[str, str]) -> str:
    """Plots by caption, one under the other, as the content of an .svg file."""
    each = CAPTION + HEIGHT
    parts = [
        f'<text x="{LEFT}" y="{number * each + 18}" class="caption">{escape(caption)}</text>'
        f'<svg y="{number * each + CAPTION}" height="{HEIGHT}" {plot.removeprefix("<svg ")}'
        for number, (caption, plot) in enumerate(plots.items())
    ]
    style = (
        PLOT_STYLE + "text { font-family: system-ui, sans-serif; } .caption { font-size: 14px; fill: var(--ink); }\n"
    )
    size = f'width="{WIDTH}" height="{each * len(plots)}" viewBox="0 0 {WIDTH} {each * len(plots)}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>'
    return head + "".join(parts) + "</svg>\n"
