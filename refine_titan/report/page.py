"""Makes an HTML page that holds everything it shows and loads no other file, font or script; and the page's elements."""

import base64
import hashlib
from collections.abc import Iterable, Sequence

from refine_titan.report.charts import escape
from refine_titan.report.page_style import SCRIPT, SERIES, STYLE


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
<nav>{links}</nav>
{chr(10).join(parts)}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def definition_list(fields: Iterable[tuple[str, object]]) -> str:
    """Makes a list of (name, value)."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in fields) + "</dl>"


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1, classes: dict[int, str] | None = None) -> str:
    """Makes a table of text cells.

    Args:
        left: number of columns at the left that are text; the others are numbers.
        classes: number of a column -> its CSS class.
    """
    names = {i: "left" for i in range(1, left)} | (classes or {})
    head = "".join(_cell("th", text, names.get(i)) for i, text in enumerate(header))
    body = "".join(f"<tr>{''.join(_cell('td', text, names.get(i)) for i, text in enumerate(row))}</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def legend(names: Sequence[str]) -> str:
    """Makes a legend that names each series and its colour."""
    keys = "".join(f'<span><i class="key{i % SERIES}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return f'<div class="legend">{keys}</div>'


def filterable_cards(tasks: Sequence[str], kinds: Sequence[tuple[str, str]], cards: str) -> str:
    """Puts two menus above cards (`<article data-task data-kind>`), which show the cards of a task and of a kind."""
    task = _select("task", "all tasks", [(task, task) for task in tasks])
    kind = _select("answers", "all", kinds)
    output = '<output class="muted"></output>'
    return f'<div data-filter><div class="controls" hidden>{task}{kind}{output}</div>{cards}</div>'


def _select(label: str, every: str, options: Sequence[tuple[str, str]]) -> str:
    entries = "".join(f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in (("", every), *options))
    return f"<label>{label} <select>{entries}</select></label>"


def _section(heading: str, body: str) -> str:
    if not heading:
        return f"<section>{body}</section>"
    # In print, a browser would begin a section of several pages on a new page to keep it together.
    kind = "long" if len(body) > 20_000 else "short"
    return f'<section class="{kind}" id="{_anchor(heading)}"><h2>{escape(heading)}</h2>\n{body}\n</section>'


def _cell(tag: str, text: str, name: str | None) -> str:
    return f'<{tag} class="{name}">{escape(text)}</{tag}>' if name else f"<{tag}>{escape(text)}</{tag}>"


def _anchor(heading: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in heading.lower())
