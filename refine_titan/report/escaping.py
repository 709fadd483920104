"""Escapes text of files and models for the formats of reports, so that each of them shows it as text and never as markup."""

import html
import re
from typing import Any

import msgspec

# What neither HTML nor SVG allows: control characters but tab and newline, halves of surrogate pairs, the last two of every plane.
_LAST_TWO = "".join(chr(plane << 16 | 0xFFFE) + chr(plane << 16 | 0xFFFF) for plane in range(17))
_FORBIDDEN = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff{_LAST_TWO}]")
_LATEX = {
    "\\": r"\textbackslash{}",
    **{c: "\\" + c for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "−": "$-$",
    "–": "--",
    "…": r"\ldots{}",
}


def clean(text: object) -> str:
    """Replaces characters that HTML, SVG or UTF-8 cannot hold; a model may answer with any of them. Tabs and newlines stay."""
    text = str(text)
    # A page has millions of characters, nearly all of them printable, which is found out faster than a pattern is matched.
    return text if text.replace("\n", "").replace("\t", "").isprintable() else _FORBIDDEN.sub("\ufffd", text)


def escape(text: object) -> str:
    """Escapes text for HTML and SVG, in elements and in attributes."""
    return html.escape(clean(text), quote=True)


def json_data(value: Any) -> bytes:
    """Writes a value whose texts are `clean` as JSON that can stand in a `<script>` element: it cannot close the element."""
    return msgspec.json.encode(value).replace(b"<", b"\\u003c")


def as_text(text: object) -> str:
    """Escapes text for Markdown, so that it neither ends a table's cell nor becomes markup, a link or an image."""
    text = _on_a_line(text).replace("&", "&amp;").replace("<", "&lt;")
    # Addresses become links without brackets too.
    return re.sub(r"[\\|`\[\]@]|(?<=www)\.|:(?=//)", r"\\\g<0>", text, flags=re.IGNORECASE)


def latex_text(text: object) -> str:
    """Escapes text for LaTeX: no command, no alignment, no comment."""
    return "".join(_LATEX.get(c, c) for c in _on_a_line(text))


def csv_text(text: object) -> str:
    """Prepares text for a cell of a CSV file; a spreadsheet would take one that begins like a formula for a formula."""
    text = _on_a_line(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _on_a_line(text: object) -> str:
    return "".join(c if c.isprintable() else " " for c in str(text))
