"""Draws charts as SVG text, at any width, and keeps the numbers that they show.

Colours and fonts are classes and variables of the page (`page_style.py`), so that a chart follows the page's theme. Every mark has
a `<title>`, which is its tooltip. Coordinates are pixels at the chart's width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from refine_titan.report.axes import Axis, axis_label
from refine_titan.report.escaping import escape
from refine_titan.report.page_style import SERIES
from refine_titan.report.paper_layout import with_interval

Interval = Sequence[float] | None
# Width of an average character of the labels, in a sans-serif font of 12 px.
CHARACTER = 6.6
ROW_HEIGHT, BAR_HEIGHT = 24, 17
# Width of a chart on a telephone. Charts with more are drawn twice, and the page shows the one that fits.
NARROW = 328
# Most rows of the table of a curve, and most of its points that have a tooltip.
CURVE_ROWS, CURVE_TIPS = 40, 60
# Pixels by which the points of the last of several curves are shifted; the drawing has that much room at its right end.
MOST_SHIFT = 12.0


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


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: what it shows.
        width: pixels that it takes where there is room.
        draw: makes the SVG for a number of pixels.
        header, rows: the numbers that it shows, as text.
        series: names of the series by number, if there are several.
    """

    title: str
    width: int
    draw: Callable[[int], str]
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    series: Sequence[str] = field(default=())


def bar_chart(title: str, bars: Sequence[Bar], axis: Axis, unit: str = "", series: Sequence[str] = (), width: int = 860) -> Chart:
    """Makes horizontal bars with whiskers. Bars begin at 0 if the axis contains it, else at its lower end.

    Args:
        bars: values in the axis's unit.
        series: names of the bars' series.
    """
    header = ["task", *(["run"] if series else []), unit or "value", "95 % interval", "note"]
    rows = [
        [
            bar.label,
            *([series[bar.series]] if series else []),
            "–" if bar.value is None else number(bar.value),
            _ends(bar.interval),
            bar.note or ("no samples" if bar.value is None else ""),
        ]
        for bar in bars
    ]
    return Chart(title, width, lambda width: _draw_bars(bars, axis, width), header, rows, series)


def line_chart(
    title: str,
    lines: Sequence[Line],
    y: Axis,
    x: Axis,
    labels: tuple[str, str],
    series: Sequence[str] = (),
    size: tuple[int, int] = (276, 190),
) -> Chart:
    """Makes curves with their intervals, as bands or, for few points, as whiskers.

    Args:
        labels: of the vertical and the horizontal axis.
        series: names of the curves' series, if there are several.
        size: width and height.
    """
    own = [line for line in lines if not line.faint]
    header = [labels[1], *([line.name for line in own] if len(own) > 1 else [labels[0]])]
    # Another series of a comparison may have other steps or lengths.
    places = sorted({a for line in own for a, _ in line.points})
    shown = places[:: max(1, -(-len(places) // CURVE_ROWS))]
    columns = [_by_place(line) for line in own]
    rows = [[axis_label(a), *(column.get(a, "–") for column in columns)] for a in shown]
    return Chart(title, size[0], lambda width: _draw_lines(lines, y, x, labels, (width, size[1])), header, rows, series)


def heat_map(title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[tuple[float, int] | None]]) -> Chart:
    """Makes rows of cells.

    Args:
        values: for each row and column (value from 0 to 1, number of samples), or None, which is drawn as an empty outline.
    """
    numbers = [
        [row, *("–" if found is None else f"{100 * found[0]:.1f} of {found[1]}" for found in cells)] for row, cells in zip(rows, values)
    ]
    return Chart(title, 860, lambda width: _draw_map(title, rows, columns, values, width), ["length", *columns], numbers)


def number(value: float) -> str:
    """A number of about four digits: `0.01235`, `46.2`, `12,346`."""
    return f"{value:,.0f}" if 10_000 <= abs(value) < 1e15 else f"{value:.4g}"


def number_with_interval(value: float, interval: Interval) -> str:
    """`46.2 ±3.1`: a number with half the width of its interval, with the digits that the interval leaves certain."""
    if interval is None:
        return number(value)
    half = (interval[1] - interval[0]) / 2
    digits = min(max(-math.floor(math.log10(half)), 1), 4) if half > 0 else 1
    return with_interval(value, interval, digits)


def _draw_bars(bars: Sequence[Bar], axis: Axis, width: int) -> str:
    labels_above = width < 560
    longest = max((len(_clip(bar.label)) for bar in bars), default=0)
    left = 2 if labels_above else min(max(longest * CHARACTER + 16, 120), 260)
    right, top = width - (96 if labels_above else 112), 26
    x = lambda value: left + axis.share(value) * (right - left)  # noqa: E731
    parts, y, previous, rows = [], float(top), None, []
    for bar in bars:
        is_first = bar.label != previous
        y += 0 if previous is None else ROW_HEIGHT if is_first else BAR_HEIGHT
        y += 15 if labels_above and is_first else 0
        rows.append((bar, y, is_first))
        previous = bar.label
    bottom = y + ROW_HEIGHT
    for tick in axis.ticks:
        parts.append(_line("zero" if tick == 0 else "grid", x(tick), top - 4, x(tick), bottom))
        # A label at the end of the axis stays on the drawing.
        half = len(axis_label(tick)) * CHARACTER / 2
        parts.append(_text(max(x(tick), half), top - 10, axis_label(tick), "tick", "middle"))
    for bar, y, is_first in rows:
        if is_first:
            place = (left, y - 2, "start") if labels_above else (left - 10, y + 13, "end")
            label = _text(place[0], place[1], _clip(bar.label), "label", place[2])
            parts.append(f"<g><title>{escape(bar.label)}</title>{label}</g>")
        if bar.value is None:
            parts.append(_text(left + 6, y + 13, bar.note or "no samples", "tick", "start"))
            continue
        shown = number_with_interval(bar.value, bar.interval)
        tip = escape(f"{bar.label}: {shown}" + (f"; {bar.note}" if bar.note else ""))
        begin, end = sorted((x(0 if axis.low <= 0 <= axis.high else axis.low), x(bar.value)))
        box = f'width="{max(end - begin, 1):.1f}" height="12" rx="2"'
        marks = [f'<rect class="series{bar.series % SERIES} bar" x="{begin:.1f}" y="{y + 3:.1f}" {box}/>']
        if bar.interval is not None:
            a, b = x(bar.interval[0]), x(bar.interval[1])
            ends = f"M{a:.1f} {y + 5.5:.1f}v7M{b:.1f} {y + 5.5:.1f}v7"
            marks.append(f'<path class="whisker" d="M{a:.1f} {y + 9:.1f}H{b:.1f}{ends}"/>')
        sign = "+" if axis.low < 0 < bar.value else ""
        marks.append(_text(right + 10, y + 13, sign + shown, "value", "start"))
        hit = f'<rect class="hit" x="0" y="{y:.1f}" width="{width}" height="{BAR_HEIGHT}"/>'
        parts.append(f"<g><title>{tip}</title>{hit}{''.join(marks)}</g>")
    return _svg(width, bottom + 6, parts)


def _draw_lines(lines: Sequence[Line], y_axis: Axis, x_axis: Axis, labels: tuple[str, str], size: tuple[int, int]) -> str:
    width, height = size
    left = 14 + max((len(axis_label(t)) for t in y_axis.ticks), default=0) * CHARACTER
    right, top, bottom = width - 14.0, 24.0, height - 34.0
    x = lambda v: left + (right - left) * x_axis.share(v)  # noqa: E731
    y = lambda v: bottom - (bottom - top) * y_axis.share(v)  # noqa: E731
    parts = [_text(2, 12, labels[0], "tick", "start"), _line("zero", left, bottom, right, bottom)]
    for tick in y_axis.ticks:
        if tick != y_axis.low:
            parts.append(_line("grid", left, y(tick), right, y(tick)))
        parts.append(_text(left - 6, y(tick) + 4, axis_label(tick), "tick", "end"))
    last = -math.inf
    for tick in x_axis.ticks:
        half = len(axis_label(tick)) * CHARACTER / 2
        centre = min(x(tick), width - half)
        if centre - half > last + 4:
            parts.append(_line("zero", x(tick), bottom, x(tick), bottom + 3))
            parts.append(_text(centre, bottom + 15, axis_label(tick), "tick", "middle"))
            last = centre + half
    parts.append(_text((left + right) / 2, height - 4, labels[1], "tick", "middle"))
    # Without a shift, the whiskers of several curves at one x would hide each other.
    shift = min(4.0, MOST_SHIFT / max([1, *(line.series % SERIES for line in lines)]))
    for line in sorted(lines, key=lambda line: not line.faint):
        parts += _curve(line, x, y, shift)
    return _svg(width, height, parts)


def _draw_map(
    title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[tuple[float, int] | None]], width: int
) -> str:
    left = 16 + max(map(len, rows)) * CHARACTER
    cell = min((width - left) / max(len(columns), 1), 64.0)
    height, top, parts = 26, 2, []
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
            if cell >= 26:
                kind = "cell onhot" if value > 0.5 else "cell"
                parts.append(_text(left + (j + 0.5) * cell, y + height / 2 + 4, f"{100 * value:.0f}", kind, "middle"))
    bottom, last = top + len(rows) * height, -math.inf
    for j, column in enumerate(columns):
        half = len(column) * CHARACTER / 2
        centre = min(left + (j + 0.5) * cell, width - half)
        if centre - half > last + 8:
            parts.append(_text(centre, bottom + 14, column, "tick", "middle"))
            last = centre + half
    return _svg(width, bottom + 20, parts)


def _curve(line: Line, x: Callable[[float], float], y: Callable[[float], float], shift: float) -> list[str]:
    few, colour = len(line.points) <= 12, line.series % SERIES
    dodge = shift * colour if few and not line.faint else 0
    points = [(x(a) + dodge, y(b)) for a, b in line.points]
    path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
    if line.faint:
        return [f'<path class="curve stroke{colour} faint" d="{path}"/>']
    parts = []
    ends = [(a, y(i[0]), y(i[1])) for (a, _), i in zip(points, line.intervals) if i is not None]
    if few:
        parts += [f'<path class="curve stroke{colour} thin" d="M{a:.1f} {low:.1f}V{high:.1f}"/>' for a, low, high in ends]
    elif ends:
        band = [f"{a:.1f} {high:.1f}" for a, _, high in ends] + [f"{a:.1f} {low:.1f}" for a, low, _ in reversed(ends)]
        parts.append(f'<path class="series{colour} band" d="M{"L".join(band)}Z"/>')
    parts.append(f'<path class="curve stroke{colour}" d="{path}"><title>{escape(line.name)}</title></path>')
    intervals = list(line.intervals) + [None] * (len(points) - len(line.intervals))
    # A tooltip for every point would make up most of a long curve's text.
    stride = max(1, len(points) // CURVE_TIPS)
    for (a, b), (value_x, value_y), interval in list(zip(points, line.points, intervals))[::stride]:
        tip = escape(f"{line.name}, {axis_label(value_x)}: {number_with_interval(value_y, interval)}")
        mark = "" if not few else f'<circle class="series{colour}" cx="{a:.1f}" cy="{b:.1f}" r="3.2"/>'
        parts.append(f'<g><title>{tip}</title>{mark}<circle class="hit" cx="{a:.1f}" cy="{b:.1f}" r="6"/></g>')
    return parts


def _by_place(line: Line) -> dict[float, str]:
    intervals = list(line.intervals) + [None] * (len(line.points) - len(line.intervals))
    return {a: number_with_interval(b, interval) for (a, b), interval in zip(line.points, intervals)}


def _ends(interval: Interval) -> str:
    return "–" if interval is None else f"{number(interval[0])} to {number(interval[1])}"


def _clip(label: str) -> str:
    return label if len(label) <= 38 else f"{label[:18]}…{label[-19:]}"


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    # The figure around it has the title and the numbers for whoever does not see the drawing.
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg aria-hidden="true" {size}>{"".join(parts)}</svg>'
