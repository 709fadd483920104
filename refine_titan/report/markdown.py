"""Shows the results of one or several runs as Markdown, in the layout of the paper's tables."""

from collections.abc import Sequence

from refine_titan.report.escaping import as_text
from refine_titan.report.measurement import measurement_fields
from refine_titan.report.records import Record
from refine_titan.report.result_tables import NOTE, result_tables
from refine_titan.report.tables import markdown_table


def results_page(runs: Sequence[Record]) -> str:
    """Makes `results.md`: every table that the runs have numbers for, and what was measured."""
    tables = result_tables(runs)
    parts = ["# Results", NOTE]
    parts += [f"## {table.title}\n\n{markdown_table(table.header, table.rows, table.left)}" for table in tables]
    if not tables:
        parts.append("No sample was finished.")
    parts.append("## What was measured\n\n" + "\n".join(line for run in runs for line in measurement_list(run)))
    return "\n\n".join(parts) + "\n"


def measurement_list(run: Record) -> list[str]:
    """Makes a Markdown list of what the run measured, and how."""
    fields = measurement_fields(run)
    return [f"- **{as_text(run['name'])}**", *(f"  - {name}: {as_text(value)}" for name, value in fields)]
