"""Draws charts as SVG text, for a page that loads no other file.

Colours and fonts are classes and variables of the page (`page_style.py`), so that a chart follows the page's theme. Every mark has
a `<title>`, which is its tooltip and what a screen reader says. Coordinates are pixels at the chart's natural size.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from refine_titan.report.paper_layout import with_interval

Interval = Sequence[float] | None
# Width of an average character of the labels, in a sans-serif font of 12 px.
CHARACTER = 6.6
ROW_HEIGHT = 24


@dataclass(frozen=True)
class Bar:
    """A labelled value. Bars with the same label stand together, one for each `series`, counted from 0."""

    label: str
    value: float | None
    interval: Interval = None
    note: str = ""
    series: int = 0


@dataclass(frozen=True)
class Line:
    """A curve of (x, y) points, each with an interval or None. A `faint` curve lies behind the others and has no tooltip."""

    name: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[Interval] = ()
    series: int = 0
    faint: bool = False


def escape(text: object) -> str:
    """Escapes text for HTML and SVG: markup becomes text, and characters that neither format allows are replaced."""
    # Tabs and newlines stay. A model may answer with lone surrogates and control characters, which cannot be written.
    clean = "".join(
        c
        if c in "\n\t" or not (ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 or ord(c) & 0xFFFE == 0xFFFE)
        else "\ufffd"
        for c in str(text)
    )
    return html.escape(clean, quote=True)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers, the first at or below `low`, the last at or above `high`."""
    if not high > low:
        low, high = low - (abs(low) * 0.05 or 1.0), high + (abs(high) * 0.05 or 1.0)
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def axis_label(value: float) -> str:
    """Formats a number for an axis: `0.25`, `1,200`, or `16K` for a multiple of 1024."""
    if value >= 1024 and value % 1024 == 0:
        return f"{int(value // 1024)}K"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.1e}"
    return f"{value:,.10g}"


def bar_chart(title: str, bars: Sequence[Bar], ticks: Sequence[float], width: int = 860) -> str:
    """Draws horizontal bars with whiskers. Bars begin at 0 if the axis contains it, else at its lower end.

    Args:
        bars: values in the axis's unit.
        ticks: the first and last give the axis's range.
    """
    label_width = min(max(max((len(_clip(bar.label)) for bar in bars), default=0) * CHARACTER + 16, 120), 260)
    left, right, top = label_width, width - 112, 26
    low, high = ticks[0], ticks[-1]
    x = lambda value: left + (min(max(value, low), high) - low) / (high - low) * (right - left)  # noqa: E731
    parts, y, previous = [], float(top), None
    rows = []
    for bar in bars:
        y += 0 if previous is None else ROW_HEIGHT if bar.label != previous else 17
        rows.append((bar, y, bar.label != previous))
        previous = bar.label
    bottom = y + ROW_HEIGHT
    for tick in ticks:
        parts.append(_line("zero" if tick == 0 else "grid", x(tick), top - 4, x(tick), bottom))
        parts.append(_text(x(tick), top - 10, axis_label(tick), "tick", "middle"))
    for bar, y, is_first in rows:
        if is_first:
            label = _text(left - 10, y + 13, _clip(bar.label), "label", "end")
            parts.append(f"<g><title>{escape(bar.label)}</title>{label}</g>")
        if bar.value is None:
            parts.append(_text(left + 6, y + 13, bar.note or "no samples", "tick", "start"))
            continue
        tip = escape(f"{bar.label}: {_with_interval(bar.value, bar.interval)}" + (f"; {bar.note}" if bar.note else ""))
        begin, end = sorted((x(0 if low <= 0 <= high else low), x(bar.value)))
        size = f'width="{max(end - begin, 1):.1f}" height="12" rx="2"'
        marks = [f'<rect class="series{bar.series} bar" x="{begin:.1f}" y="{y + 3:.1f}" {size}/>']
        if bar.interval is not None:
            a, b = x(bar.interval[0]), x(bar.interval[1])
            ends = f"M{a:.1f} {y + 5.5:.1f}v7M{b:.1f} {y + 5.5:.1f}v7"
            marks.append(f'<path class="whisker" d="M{a:.1f} {y + 9:.1f}H{b:.1f}{ends}"/>')
        sign = "+" if low < 0 < bar.value else ""
        marks.append(_text(right + 10, y + 13, sign + _with_interval(bar.value, bar.interval), "value", "start"))
        hit = f'<rect class="hit" x="0" y="{y:.1f}" width="{width}" height="17"/>'
        parts.append(f"<g><title>{tip}</title>{hit}{''.join(marks)}</g>")
    return _svg(title, width, bottom + 6, parts)


def line_chart(
    title: str,
    lines: Sequence[Line],
    y_label: str,
    x_label: str,
    y_ticks: Sequence[float],
    x_ticks: Sequence[float],
    log_x: bool = False,
    width: int = 276,
    height: int = 190,
) -> str:
    """Draws curves with their intervals, as bands or, for few points, as whiskers.

    Args:
        y_ticks, x_ticks: the first and last give the axis's range.
    """
    left, right, top, bottom = 14 + max(len(axis_label(t)) for t in y_ticks) * CHARACTER, width - 14.0, 34.0, height - 34.0
    warp = math.log2 if log_x else float
    x_low, x_high = warp(x_ticks[0]), warp(x_ticks[-1])
    y_low, y_high = y_ticks[0], y_ticks[-1]
    x = lambda v: left + (right - left) * ((warp(v) - x_low) / (x_high - x_low) if x_high > x_low else 0.5)  # noqa: E731
    y = lambda v: bottom - (bottom - top) * (min(max(v, y_low), y_high) - y_low) / (y_high - y_low)  # noqa: E731
    parts = [_text(2, 14, title, "panel", "start"), _text(width - 2, 14, y_label, "tick", "end")]
    for tick in y_ticks:
        parts.append(_line("zero" if tick == y_low else "grid", left, y(tick), right, y(tick)))
        parts.append(_text(left - 6, y(tick) + 4, axis_label(tick), "tick", "end"))
    last = -math.inf
    for tick in x_ticks:
        half = len(axis_label(tick)) * CHARACTER / 2
        if x(tick) - half > last + 4:
            parts.append(_text(min(x(tick), width - half), bottom + 15, axis_label(tick), "tick", "middle"))
            last = x(tick) + half
    parts.append(_text((left + right) / 2, height - 4, x_label, "tick", "middle"))
    for line in sorted(lines, key=lambda line: not line.faint):
        parts += _curve(line, x, y)
    return _svg(f"{title}: {y_label} over {x_label}", width, height, parts)


def heat_map(
    title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[tuple[float, int] | None]], width: int = 860
) -> str:
    """Draws rows of cells.

    Args:
        values: for each row and column (value from 0 to 1, number of samples), or None, which is drawn as an empty outline.
    """
    left = 16 + max(map(len, rows)) * CHARACTER
    cell = min((width - left) / max(len(columns), 1), 64.0)
    height, top = 26, 24
    parts = [_text(0, 12, title, "panel", "start")]
    for i, (row, cells) in enumerate(zip(rows, values)):
        y = top + i * height
        parts.append(_text(left - 8, y + height / 2 + 4, row, "label", "end"))
        for j, found in enumerate(cells):
            box = f'x="{left + j * cell + 0.5:.1f}" y="{y + 0.5:.1f}" width="{max(cell - 1, 1):.1f}" height="{height - 1}" rx="2"'
            where = escape(f"{title}, {row}, depth {columns[j]}: ")
            if found is None:
                parts.append(f'<rect class="hollow" {box}><title>{where}no samples</title></rect>')
                continue
            value, count = found
            shown = f"{100 * value:.1f} % of {count} sample{'s' if count != 1 else ''}"
            layers = f'<rect class="cold" {box}/><rect class="hot" fill-opacity="{value:.3f}" {box}/>'
            parts.append(f"<g><title>{where}{shown}</title>{layers}</g>")
            if cell >= 34:
                kind = "cell onhot" if value > 0.5 else "cell"
                parts.append(_text(left + (j + 0.5) * cell, y + height / 2 + 4, f"{100 * value:.0f}", kind, "middle"))
    bottom, last = top + len(rows) * height, -math.inf
    for j, column in enumerate(columns):
        centre, half = left + (j + 0.5) * cell, len(column) * CHARACTER / 2
        if centre - half > last + 8:
            parts.append(_text(centre, bottom + 14, column, "tick", "middle"))
            last = centre + half
    return _svg(title, width, bottom + 20, parts)


def _curve(line: Line, x, y) -> list[str]:
    few = len(line.points) <= 12
    # Without a shift, the whiskers of several curves at one x would hide each other.
    dodge = 4 * line.series if few else 0
    points = [(x(a) + dodge, y(b)) for a, b in line.points]
    path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
    if line.faint:
        return [f'<path class="stroke{line.series} faint" d="{path}"/>']
    parts = []
    ends = [(a, y(i[0]), y(i[1])) for (a, _), i in zip(points, line.intervals) if i is not None]
    if few:
        parts += [f'<path class="stroke{line.series} thin" d="M{a:.1f} {low:.1f}V{high:.1f}"/>' for a, low, high in ends]
    elif ends:
        band = [f"{a:.1f} {high:.1f}" for a, _, high in ends] + [f"{a:.1f} {low:.1f}" for a, low, _ in reversed(ends)]
        parts.append(f'<path class="series{line.series} band" d="M{"L".join(band)}Z"/>')
    parts.append(f'<path class="stroke{line.series}" d="{path}"><title>{escape(line.name)}</title></path>')
    intervals = list(line.intervals) + [None] * (len(points) - len(line.intervals))
    # A tooltip for every point would make up most of a long curve's text.
    stride = max(1, len(points) // 60)
    for (a, b), (value_x, value_y), interval in list(zip(points, line.points, intervals))[::stride]:
        tip = escape(f"{line.name}, {axis_label(value_x)}: {_with_interval(value_y, interval)}")
        mark = "" if not few else f'<circle class="series{line.series}" cx="{a:.1f}" cy="{b:.1f}" r="3.2"/>'
        parts.append(f'<g><title>{tip}</title>{mark}<circle class="hit" cx="{a:.1f}" cy="{b:.1f}" r="6"/></g>')
    return parts


def _with_interval(value: float, interval: Interval) -> str:
    digits = 1 if abs(value) >= 1 or (interval is not None and max(map(abs, interval)) >= 1) else 3
    return with_interval(value, interval, digits)


def _clip(label: str) -> str:
    return label if len(label) <= 38 else f"{label[:18]}…{label[-19:]}"


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _svg(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    label = f'role="img" aria-label="{escape(title)}" viewBox="0 0 {width:.0f} {height:.0f}" style="width:{width:.0f}px"'
    svg = f"<svg {label}>{''.join(parts)}</svg>"
    # On a narrow screen a wide chart scrolls. Shrunk to fit, its labels would be unreadable.
    return f'<div class="wide">{svg}</div>' if width > 500 else svg
