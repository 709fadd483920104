"""Writes charts as SVG files of their own, for papers and slides: light colours, no variables, a legend inside."""

import re
from collections.abc import Iterable
from pathlib import Path

from refine_titan.report.charts import CHARACTER, Chart
from refine_titan.report.escaping import escape
from refine_titan.report.output import write_output
from refine_titan.report.page_style import CHART_STYLE, LIGHT, SERIES

# Characters of a file's name that come from the chart's title.
NAME_CHARACTERS = 80


def write_svg_files(folder: Path, charts: Iterable[Chart]) -> list[Path]:
    """Writes each chart into a file of the folder that is named for its title; returns the files.

    Raises:
        UserError: if a file cannot be written.
    """
    files: list[Path] = []
    for chart in charts:
        name = re.sub(r"[^a-z0-9]+", "-", chart.title.lower()).strip("-")[:NAME_CHARACTERS] or "chart"
        path, number = folder / f"{name}.svg", 2
        while path in files:
            path, number = folder / f"{name}-{number}.svg", number + 1
        write_output(path, svg_file(chart))
        files.append(path)
    return files


def svg_file(chart: Chart) -> str:
    """Makes the text of a chart's own SVG file."""
    drawing = chart.draw(chart.width)
    width, height = (int(value) for value in re.search(r'viewBox="0 0 (\d+) (\d+)"', drawing).groups())
    keys, x, y = [], 4.0, 14
    for i, name in enumerate(chart.series):
        if x > 4 and x + 24 + len(name) * CHARACTER > width:
            x, y = 4.0, y + 18
        keys.append(f'<rect class="series{i % SERIES}" x="{x:.1f}" y="{y - 10}" width="12" height="12" rx="3"/>')
        keys.append(f'<text x="{x + 18:.1f}" y="{y}">{escape(name)}</text>')
        x += 40 + len(name) * CHARACTER
    top = y + 10 if keys else 0
    # Programs that draw SVG for print know no CSS variables.
    style = re.sub(r"var\(--(\w+)\)", lambda found: LIGHT[found[1]], CHART_STYLE)
    inner = drawing[drawing.index(">") + 1 : -len("</svg>")]
    size = f'width="{width}" height="{height + top}" viewBox="0 0 {width} {height + top}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}><title>{escape(chart.title)}</title><style>{style}</style>'
        f'{"".join(keys)}<g transform="translate(0 {top})">{inner}</g></svg>\n'
    )
