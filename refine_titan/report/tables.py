"""Tables of results in the forms that papers and notes have: Markdown, LaTeX (booktabs) and CSV."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from refine_titan.report.escaping import as_text, csv_text, latex_text

# Fields of `csv_rows`: a number of a run, or of two runs that are compared.
CSV_HEADER = ("run", "benchmark", "task", "length", "metric", "value", "ci95_low", "ci95_high", "num_samples")

# Most characters of a table's header on a page of paper. A table of runs with more has a column for each run instead.
MAX_LATEX_CHARACTERS = 72


@dataclass(frozen=True)
class Table:
    """A table of text cells. The first `left` columns are text, the others numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Makes a Markdown table. The first `left` columns are text, the others numbers."""
    align = [":--" if i < left else "--:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(as_text(text) for text in row) + " |" for row in (header, align, *rows))


def latex_page(tables: Iterable[Table], note: str) -> str:
    r"""Makes the text of a `.tex` file to `\input`: a `table` with `booktabs` rules for each table, with its title and note as caption."""
    parts = [r"% Needs \usepackage{booktabs,graphicx}; wide tables are shrunk to the width of the text."]
    return "\n\n".join([*parts, *(_latex_table(table, note) for table in tables)]) + "\n"


def _latex_table(table: Table, note: str) -> str:
    if sum(map(len, table.header)) > MAX_LATEX_CHARACTERS and table.left == 1 and len(table.rows) < len(table.header):
        (_, *runs), *rows = zip(table.header, *table.rows)
        table = Table(table.title, ["", *runs], rows)
    align = "l" * table.left + "r" * (len(table.header) - table.left)
    rows = [" & ".join(map(latex_text, row)) + r" \\" for row in (table.header, *table.rows)]
    body = "\n".join([r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule"])
    return "\n".join(
        [
            r"\begin{table}[tb]",
            r"\centering",
            rf"\caption{{{latex_text(table.title)}. {latex_text(note)}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{align}}}",
            body,
            r"\end{tabular}}",
            r"\end{table}",
        ]
    )


def csv_page(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Makes the text of a CSV file (RFC 4180, with newlines of Unix). Numbers have all their digits; None is an empty cell."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([csv_text(value) if isinstance(value, str) else value for value in row] for row in rows)
    return file.getvalue()
