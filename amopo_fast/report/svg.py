"""A chart as inline SVG. Colors are CSS variables, so that one page serves light and dark screens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape

from amopo_fast.report.panels import Panel, Series

WIDTH, HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 34
_MOST_POINTS = 600  # of a line; more would be closer than a pixel


def chart(panel: Panel) -> str:
    """The panel as a <figure>: heading, legend, drawing, and the numbers that the page's script shows on hover."""
    xs = [x for series in panel.series for x, _ in series.points]
    ys = [y for series in panel.series for _, y in series.points]
    # An area may leave the chart; a whisker belongs to its dot.
    ys += [y for s in panel.series if s.kind == "dots" for _, low, high in s.band or () for y in (low, high)]
    x_low, x_high = (-0.5, len(panel.x_names) - 0.5) if panel.x_names else _spread(min(xs), max(xs), 0.0)
    low, high = _spread(min(ys), max(ys), 0.05)
    low = low if panel.y_range[0] is None else panel.y_range[0]
    high = high if panel.y_range[1] is None else panel.y_range[1]
    y_ticks = [tick for tick in _ticks(low, high, 5) if low <= tick <= high]

    def px(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)

    def py(y: float) -> float:
        return HEIGHT - _BOTTOM - (min(max(y, low), high) - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{py(t):.1f}" y2="{py(t):.1f}"/>'
        f'<text class="tick" x="{_LEFT - 6}" y="{py(t) + 4:.1f}" text-anchor="end">{_number(t)}</text>'
        for t in y_ticks
    ]
    if panel.x_names:
        named: Iterable[tuple[float, str]] = enumerate(panel.x_names)
    else:
        named = ((t, _number(t)) for t in _ticks(x_low, x_high, 6) if x_low <= t <= x_high)
    for x, name in named:
        parts.append(
            f'<text class="tick" x="{px(x):.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{escape(name)}</text>'
        )
    parts.append(
        f'<text class="label" x="{WIDTH - _RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(panel.x_label)}</text>'
    )
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{py(low):.1f}" y2="{py(low):.1f}"/>')
    for series in panel.series:
        parts += _drawn(series, px, py)
    hover = [
        [series.name, series.color, [[round(px(x), 1), round(py(y), 1), _number(y)] for x, y in _thin(series.points)]]
        for series in panel.series
        if series.kind != "faint"
    ]
    legend = "".join(
        f'<span class="key{" dashed" if series.dashed else ""}" style="--c:var(--c{series.color % 8})">'
        f"{escape(series.name)}</span>"
        for series in panel.series
        if series.legend
    )
    note = f'<p class="note">{escape(panel.note)}</p>' if panel.note else ""
    data = json.dumps(hover, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<figure class="card"><figcaption>{escape(panel.title)}</figcaption>{note}'
        f'<div class="legend">{legend}</div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(panel.title)}">{"".join(parts)}</svg>'
        f'<script type="application/json">{data}</script></figure>'
    )


def _drawn(series: Series, px, py) -> list[str]:
    style = f'style="--c:var(--c{series.color % 8})"'
    parts = []
    if series.band and series.kind == "dots":
        parts += [
            f'<line class="whisker" {style} x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{py(a):.1f}" y2="{py(b):.1f}"/>'
            for x, a, b in series.band
        ]
    elif series.band:
        band = _thin(series.band)
        edge = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
        parts.append(f'<polygon class="band" {style} points="{_path(edge, px, py)}"/>')
    points = _thin(series.points)
    if len(points) > 1 and (series.kind != "dots" or series.dashed):
        kind = f"{series.kind} dashed" if series.dashed else series.kind
        parts.append(f'<polyline class="{kind}" {style} points="{_path(points, px, py)}"/>')
    if series.kind == "dots":
        parts += [f'<circle {style} cx="{px(x):.1f}" cy="{py(y):.1f}" r="3.2"/>' for x, y in points]
    return parts


def _path(points: Iterable[tuple[float, float]], px, py) -> str:
    return " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)


def _thin(points: Sequence) -> Sequence:
    if len(points) <= _MOST_POINTS:
        return points
    step = (len(points) - 1) / (_MOST_POINTS - 1)
    return [points[round(index * step)] for index in range(_MOST_POINTS)]


def _spread(low: float, high: float, margin: float) -> tuple[float, float]:
    """The range with a margin, and with some width where it has none."""
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        half = abs(low) * 0.1 or 1.0
        return low - half, high + half
    return low - margin * (high - low), high + margin * (high - low)


def _ticks(low: float, high: float, count: int) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    return [float(tick) for tick in MaxNLocator(count).tick_values(low, high)]


def _number(value: float) -> str:
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if size and size < 1e-3:
        return f"{value:.2e}".replace("e-0", "e-")
    return f"{value:.4g}"
