"""Charts as SVG text: lines over steps, dots with intervals, bars. The colours also differ in a greyscale print.

Every text is escaped. Charts take their text colour from the page (currentColor), so they suit light and dark pages.
"""

import html
import json
import math
from collections.abc import Callable

Range = tuple[float, float]  # (low, high)

# (colour, dash); both differ, and so does the lightness
STYLES = [
    ("#1f5fa8", ""),
    ("#d9822b", "6 3"),
    ("#2a8a57", "2 2"),
    ("#a2295b", "8 3 2 3"),
    ("#7a6fd0", "1 3"),
    ("#8f7a00", "10 4"),
    ("#4a4a4a", "4 1"),
    ("#0097a7", "3 5"),
]


def style(i: int) -> tuple[str, str]:
    return STYLES[i % len(STYLES)]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from low to high."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next((k for k in (1, 2, 5, 10) if (high - low) / (k * step) <= count), 10)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def label(x: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:.3g}{unit}"
    return f"{x:.3g}"


def text(x: float, y: float, words: str, anchor: str = "start", size: int = 11, more: str = "") -> str:
    words = html.escape(str(words))
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" {more}>{words}</text>'


def line(x1: float, y1: float, x2: float, y2: float, more: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {more}/>'


def figure(width: float, height: float, parts: list[str], title: str, more: str = "") -> str:
    """The <svg> element. title: read by screen readers."""
    head = f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" fill="currentColor" {more}>'
    return f"{head}<title>{html.escape(title)}</title>{''.join(parts)}</svg>"


def axes(
    box: tuple[float, float, float, float], x_range: Range, y_range: Range, x_label: str, y_label: str
) -> tuple[list[str], Callable[[float, float], tuple[float, float]]]:
    """Grid, tick labels and axis names in box (left, top, right, bottom), and the function (x, y) -> pixels."""
    left, top, right, bottom = box
    (x0, x1), (y0, y1) = x_range, y_range
    to_pixel = lambda x, y: (
        left + (right - left) * (x - x0) / ((x1 - x0) or 1),
        bottom - (bottom - top) * (y - y0) / ((y1 - y0) or 1),
    )
    parts = []
    for x in ticks(x0, x1):
        px, _ = to_pixel(x, y0)
        parts += [line(px, top, px, bottom, 'class="grid"'), text(px, bottom + 14, label(x), "middle", 10)]
    for y in ticks(y0, y1):
        _, py = to_pixel(x0, y)
        parts += [line(left, py, right, py, 'class="grid"'), text(left - 4, py + 3, label(y), "end", 10)]
    parts.append(text((left + right) / 2, bottom + 28, x_label, "middle"))
    parts.append(text(left - 40, top - 8, y_label, "start"))
    return parts, to_pixel


def line_chart(title: str, y_label: str, series: dict[str, list[tuple[float, float]]], names: list[str]) -> str:
    """Lines over steps, by name. names: of all charts on the page, so that a name has the same colour in each.

    The points are embedded as JSON; the page's script shows them when the mouse hovers over the chart.
    """
    points = [p for line_points in series.values() for p in line_points]
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    low, high = min(ys), max(ys)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1
    x_range, y_range = (min(xs), max(xs)), (low - margin, high + margin)
    parts, to_pixel = axes((52, 28, 452, 190), x_range, y_range, "step", y_label)
    for name, line_points in series.items():
        colour, dash = style(names.index(name))
        path = " ".join("{:.1f},{:.1f}".format(*to_pixel(*p)) for p in line_points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-dasharray="{dash}" stroke-width="1.6"/>'
        )
        if len(line_points) < 3:
            for p in line_points:
                parts.append('<circle cx="{:.1f}" cy="{:.1f}" r="3" fill="{}"/>'.format(*to_pixel(*p), colour))
    parts.append('<line class="cursor" x1="0" y1="28" x2="0" y2="190" visibility="hidden"/>')
    data = json.dumps({"x": x_range, "box": [52, 452], "series": series})
    return figure(470, 226, parts, title, f'class="lines" data-chart="{html.escape(data)}"')


def legend(names: list[str], shown: list[str] | None = None) -> str:
    """A sample of each name's line. shown: the names in this chart, a subset of `names`; default: all."""
    parts, x = [], 0
    for name in names if shown is None else shown:
        colour, dash = style(names.index(name))
        parts.append(line(x, 8, x + 26, 8, f'stroke="{colour}" stroke-dasharray="{dash}" stroke-width="2.4"'))
        parts.append(text(x + 32, 12, name))
        x += 52 + 7 * len(name)
    return figure(max(x, 10), 18, parts, "legend", f'class="legend" style="max-width:{x}px"')


def dot_chart(title: str, rows: list[tuple[str, float, float, float]], base: float, x_label: str) -> str:
    """A dot with its interval for each (name, low, value, high), and a line at the base's value."""
    left = 20 + 7 * max(len(name) for name, *_ in rows)
    height = 34 + 22 * len(rows)
    x_range = min(low for _, low, _, _ in rows), max(high for *_, high in rows)
    margin = (x_range[1] - x_range[0]) * 0.06 or 0.5
    box = (left, 20, left + 400, height - 10)
    parts, to_pixel = axes(box, (x_range[0] - margin, x_range[1] + margin), (0, 0), x_label, "")
    parts = [p for p in parts if 'text-anchor="end"' not in p]  # no numbers on the axis of names
    base_x, _ = to_pixel(base, 0)
    parts.append(line(base_x, 20, base_x, height - 10, 'stroke="currentColor" stroke-dasharray="3 3"'))
    for i, (name, low, value, high) in enumerate(rows):
        y, (x1, _), (x, _), (x2, _) = 34 + 22 * i, to_pixel(low, 0), to_pixel(value, 0), to_pixel(high, 0)
        parts += [text(left - 8, y + 4, name, "end", 12), line(x1, y, x2, y, 'stroke="#1f5fa8" stroke-width="2"')]
        parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="4.5" fill="#1f5fa8"/>')
    return figure(left + 420, height + 24, parts, title, f'style="max-width:{left + 420}px"')


def bar_chart(title: str, rows: list[tuple[str, float, float]], names: tuple[str, str]) -> str:
    """Two bars per row, one inside the other. rows: (name, outer, inner), such as before and after."""
    left = 12 + 6.4 * max(len(name) for name, *_ in rows)
    largest = max(max(outer, inner) for _, outer, inner in rows) or 1
    parts = [text(left, 12, f"light: {names[0]}, dark: {names[1]}", size=11)]
    for i, (name, outer, inner) in enumerate(rows):
        y = 20 + 15 * i
        parts.append(text(left - 6, y + 10, name, "end", 10))
        parts.append(f'<rect x="{left:.0f}" y="{y}" width="{380 * outer / largest:.1f}" height="11" fill="#9db7d5"/>')
        parts.append(
            f'<rect x="{left:.0f}" y="{y + 3}" width="{380 * inner / largest:.1f}" height="5" fill="#123a68"/>'
        )
        parts.append(text(left + 380 * outer / largest + 5, y + 10, f"{outer:g} to {inner:g}", size=9))
    return figure(left + 470, 26 + 15 * len(rows), parts, title, f'style="max-width:{left + 470:.0f}px"')


def error_chart(title: str, series: dict[str, list[tuple[float, float, float]]], x_label: str, y_label: str) -> str:
    """Points (x, y, standard error) by name, joined by a line: a score over a fusion weight."""
    points = [p for some in series.values() for p in some]
    x_range = min(p[0] for p in points), max(p[0] for p in points)
    low, high = min(p[1] - p[2] for p in points), max(p[1] + p[2] for p in points)
    margin = (high - low) * 0.05 or 1
    parts, to_pixel = axes((60, 28, 452, 210), x_range, (low - margin, high + margin), x_label, y_label)
    for i, some in enumerate(series.values()):
        colour, dash = style(i)
        path = " ".join("{:.1f},{:.1f}".format(*to_pixel(x, y)) for x, y, _ in sorted(some))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-dasharray="{dash}"/>')
        for x, y, error in some:
            (px, top), (_, middle), (_, bottom) = to_pixel(x, y + error), to_pixel(x, y), to_pixel(x, y - error)
            parts.append(line(px, top, px, bottom, f'stroke="{colour}"'))
            parts.append(f'<circle cx="{px:.1f}" cy="{middle:.1f}" r="3.5" fill="{colour}"/>')
    return legend(list(series)) + figure(470, 246, parts, title)
