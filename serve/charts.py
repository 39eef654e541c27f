"""Small SVG charts for the report: no script, no network, colours from CSS variables so that they follow the theme.

All are drawn 360 units wide, so that their text stays readable on a phone; `class` attributes carry the colours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 30
MAX_POINTS = 240
ARM_CLASS = {"baseline": "a", "candidate": "b"}


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic scale from values to drawing units."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, v = self.low, self.high, value
        if self.log:
            low, high, v = math.log(low), math.log(high), math.log(max(v, 1e-300))
        share = (v - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, count: int = 4) -> list[float]:
        """Return round numbers within the axis."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [m * 10.0**d for d in decades for m in (1, 2, 5) if self.low <= m * 10.0**d <= self.high]
            if len(found) >= 2:
                return found[:: max(1, math.ceil(len(found) / (count + 1)))]
        step = nice((self.high - self.low) / max(count, 1))
        first = math.ceil(self.low / step)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def nice(value: float) -> float:
    """Round up to 1, 2 or 5 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= value * 0.999)


def short(value: float) -> str:
    """A tick's label."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _svg(parts: Iterable[str], label: str, height: int = HEIGHT) -> Markup:
    return Markup(f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>')


def _tick(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="tick" x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}">{escape(text)}</text>'


def _grid(x: Axis, y: Axis, x_unit: str, y_label: Sequence[tuple[float, str]]) -> list[str]:
    parts = []
    for value, text in y_label:
        at = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(_tick(LEFT - 6, at + 4, text, "end"))
    for value in x.ticks():
        at = x(value)
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(_tick(at, HEIGHT - BOTTOM + 15, short(value)))
    parts.append(_tick(WIDTH - RIGHT, HEIGHT - 2, x_unit, "end"))
    return parts


def cumulative(a: np.ndarray, b: np.ndarray, unit: str, label: str) -> Markup:
    """Draw both arms' cumulative distributions: the share of values at most x. Both sorted, not empty."""
    # The outermost half percent would squeeze the rest; it is drawn at the edge.
    high = float(max(np.quantile(a, 0.995), np.quantile(b, 0.995)))
    low = max(float(min(np.quantile(a, 0.005), np.quantile(b, 0.005))), high / 100)
    log_scale = high / low > 20
    pad = 1.03 if log_scale else 1.0
    x = Axis(low / pad, max(high * pad, low * 1.01), LEFT, WIDTH - RIGHT, log_scale)
    y = Axis(0, 1, HEIGHT - BOTTOM, TOP)
    parts = _grid(x, y, unit, [(0.0, "0"), (0.5, "50%"), (0.9, "90%"), (1.0, "100%")])
    for values, name in ((a, "a"), (b, "b")):
        shares = np.linspace(0, 1, min(len(values), MAX_POINTS))
        points = " ".join(f"{x(min(max(float(np.quantile(values, q)), x.low), x.high))},{y(float(q))}" for q in shares)
        parts.append(f'<polyline class="line {name}" points="{points}"/>')
    return _svg(parts, label)


def timeline(points: Sequence[tuple[str, float, float]], unit: str, label: str) -> Markup:
    """Draw one dot a request: (arm, seconds since the start, value)."""
    if not points:
        return Markup("")
    values = np.array([value for _, _, value in points])
    x = Axis(0, max(t for _, t, _ in points) or 1, LEFT, WIDTH - RIGHT)
    top = float(np.quantile(values, 0.99)) * 1.15
    y = Axis(0, top or 1, HEIGHT - BOTTOM, TOP)
    parts = _grid(x, y, "seconds", [(v, short(v)) for v in y.ticks()])
    every = max(1, len(points) // 1500)
    for arm, at, value in points[::every]:
        title = f"{arm}: {short(value)} {unit} at {at:.1f} s"
        parts.append(
            f'<circle class="dot {ARM_CLASS[arm]}" cx="{x(at)}" cy="{y(min(value, y.high))}" r="2.4">'
            f"<title>{escape(title)}</title></circle>"
        )
    return _svg(parts, label)


def layer_bars(values: Sequence[float], removed: Iterable[int], label: str) -> Markup:
    """Draw one bar a decoder layer on a logarithmic scale where the values span much; removed layers stand out."""
    gone = set(removed)
    height, base = 150, 150 - 22
    positive = [v for v in values if v > 0]
    high = max(positive, default=1.0)
    low = min(positive, default=1.0)
    log_scale = high / low > 30
    y = Axis(low * 0.7 if log_scale else 0.0, high, base, 8, log_scale)
    slot = (WIDTH - 12) / len(values)
    parts = []
    for layer, value in enumerate(values):
        top = min(y(value) if value > 0 else base, base - 1)
        kind = "gone" if layer in gone else "kept"
        state = "removed" if layer in gone else "kept"
        parts.append(
            f'<rect class="bar {kind}" x="{6 + layer * slot + slot * 0.12:.2f}" y="{top:.2f}" '
            f'width="{slot * 0.76:.2f}" height="{base - top:.2f}" rx="1.5">'
            f"<title>layer {layer}: {value:.4g} ({state})</title></rect>"
        )
        if layer % max(1, math.ceil(len(values) / 12)) == 0:
            parts.append(_tick(6 + (layer + 0.5) * slot, base + 14, str(layer)))
    return _svg(parts, label, height)


def curve(points: Sequence[tuple[float, float]], x_unit: str, label: str) -> Markup:
    """Draw one line, such as a loss over tokens."""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x = Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y = Axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP)
    parts = _grid(x, y, x_unit, [(v, short(v)) for v in y.ticks()])
    line = " ".join(f"{x(px)},{y(py)}" for px, py in points)
    parts.append(f'<polyline class="line b" points="{line}"/>')
    return _svg(parts, label)
