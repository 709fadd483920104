"""Makes an HTML page that holds everything it shows and loads no other file, font or script; and the page's elements."""

import base64
import hashlib
from collections.abc import Iterable, Sequence

from refine_titan.report.charts import NARROW, Chart
from refine_titan.report.escaping import escape
from refine_titan.report.page_script import SCRIPT
from refine_titan.report.page_style import SERIES, STYLE


def html_page(title: str, subtitle: str, sections: Iterable[tuple[str, str]]) -> str:
    """Makes a page of sections (heading, HTML), in reading order; sections without HTML are left out."""
    kept = [(heading, body) for heading, body in sections if body]
    links = "".join(f'<a href="#{_anchor(heading)}">{escape(heading)}</a> ' for heading, _ in kept if heading)
    parts = [_section(heading, body) for heading, body in kept]
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<div class="path">{escape(subtitle)}</div>
<nav aria-label="sections">{links}</nav>
{chr(10).join(parts)}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def definition_list(fields: Iterable[tuple[str, object]]) -> str:
    """Makes a list of (name, value)."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in fields) + "</dl>"


def tiles(fields: Iterable[tuple[str, str, str]]) -> str:
    """Makes a row of large numbers, each with its name above and a note in small print below."""
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><span>{escape(note) or "&nbsp;"}</span></div>'
            for name, value, note in fields
        )
        + "</div>"
    )


def html_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1, classes: dict[int, str] | None = None, name: str = ""
) -> str:
    """Makes a table of text cells. Where it is too wide, it scrolls beside its first column.

    Args:
        left: number of columns at the left that are text; the others are numbers.
        classes: number of a column -> its CSS class.
        name: what the table shows, for whoever hears the page.
    """
    names = {i: "left" for i in range(1, left)} | (classes or {})
    head = "".join(_cell("th", text, names.get(i)) for i, text in enumerate(header))
    body = "".join(f"<tr>{''.join(_cell('td', text, names.get(i)) for i, text in enumerate(row))}</tr>\n" for row in rows)
    label = escape(name or f"table of {header[0] or 'averages'}")
    # With a tab index, the keyboard scrolls it.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def figure(chart: Chart) -> str:
    """Makes a figure: title, drawing, and the numbers of the drawing as a table.

    A page on a narrow screen shows a second drawing instead of a shrunk one, whose labels would be unreadable.
    """
    drawings = chart.draw(chart.width)
    if chart.width > NARROW:
        drawings = f'<div class="broad">{drawings}</div><div class="narrow">{chart.draw(NARROW)}</div>'
    table = html_table(chart.header, chart.rows, name=f"numbers of {chart.title}")
    numbers = f"<details><summary>Numbers</summary>{table}</details>"
    title = escape(chart.title)
    # Browsers do not tell every reader the caption as the figure's name.
    return f'<figure aria-label="{title}" style="max-width:{chart.width}px"><figcaption>{title}</figcaption>{drawings}{numbers}</figure>'


def figures(charts: Sequence[Chart]) -> str:
    """Makes figures that stand beside each other where there is room."""
    return f'<div class="panels">{"".join(map(figure, charts))}</div>' if charts else ""


def legend(names: Sequence[str]) -> str:
    """Makes a legend that names each series and its colour."""
    keys = "".join(f'<span><i class="key{i % SERIES}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return f'<div class="legend">{keys}</div>'


def filterable_cards(tasks: Sequence[str], kinds: Sequence[tuple[str, str]], cards: str) -> str:
    """Puts two menus above cards (`<article data-task data-kind>`), which show the cards of a task and of a kind."""
    task = select("task", "task", [("", "all tasks"), *((task, task) for task in tasks)])
    kind = select("kind", "answers", [("", "all"), *kinds])
    output = '<output class="muted"></output>'
    return f'<div data-filter><div class="controls" hidden>{task}{kind}{output}</div>{cards}</div>'


def select(name: str, label: str, options: Sequence[tuple[str, str]]) -> str:
    """Makes a menu of options (value, text)."""
    entries = "".join(f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in options)
    return f'<label>{escape(label)} <select name="{name}">{entries}</select></label>'


def _section(heading: str, body: str) -> str:
    if not heading:
        return f"<section>{body}</section>"
    return f'<section id="{_anchor(heading)}"><h2>{escape(heading)}</h2>\n{body}\n</section>'


def _cell(tag: str, text: str, name: str | None) -> str:
    return f'<{tag} class="{name}">{escape(text)}</{tag}>' if name else f"<{tag}>{escape(text)}</{tag}>"


def _anchor(heading: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in heading.lower())
