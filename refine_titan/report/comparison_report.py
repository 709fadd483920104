"""Shows a comparison of two runs as text, Markdown and an HTML page."""

from collections.abc import Sequence

from refine_titan.errors import printable
from refine_titan.report.charts import Bar, bar_chart, escape, nice_ticks
from refine_titan.report.comparison import Comparison, Row, row_name
from refine_titan.report.markdown import as_text, markdown_table, measurement_fields
from refine_titan.report.page import definition_list, html_page, html_table
from refine_titan.report.paper_layout import length_label
from refine_titan.report.result_charts import length_panels, perplexity_curves, task_bars
from refine_titan.report.results import aggregate

SIGNIFICANT = 0.05
NOTE = (
    "Scores are in percent, perplexity tasks in nats a token (lower is better). Difference: second minus first, over the samples "
    "that both runs have. p: permutation test. Holm p: p corrected for the number of rows of its table; * marks values below 0.05."
)


def text_report(comparison: Comparison) -> str:
    """Formats the tables for a terminal, without warnings and remarks."""
    labels = (printable(run.label) for run in comparison.runs)
    parts = ["A = {}\nB = {}".format(*labels), left_out_text(comparison)]
    for rows in (comparison.tasks, comparison.averages):
        if rows:
            parts.append(_aligned([_header("A", "B"), *map(_cells, rows)]))
    return "\n\n".join(part for part in parts if part) + f"\n\n{NOTE}"


def markdown_report(comparison: Comparison) -> str:
    """Formats the tables, warnings and remarks as Markdown."""
    a, b = (run.label for run in comparison.runs)
    parts = [f"# {as_text(a)} and {as_text(b)}", NOTE]
    parts += [f"- **Warning:** {as_text(warning)}" for warning in comparison.warnings]
    for title, rows in (("Tasks", comparison.tasks), ("Averages", comparison.averages)):
        if rows:
            parts.append(f"## {title}\n\n" + markdown_table(_header(a, b), [_cells(row) for row in rows], left=2))
    parts += [left_out_text(comparison), *(f"- {as_text(remark)}" for remark in comparison.remarks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def html_report(comparison: Comparison) -> str:
    """Makes the HTML page. Its charts show the samples that both runs have."""
    runs = [aggregate(run.record, run.samples) | {"name": run.label} for run in comparison.runs]
    labels = [run["name"] for run in runs]
    warnings = "".join(f'<p class="warning">{escape(warning)}</p>' for warning in comparison.warnings)
    tables = [
        html_table(_header(*labels), [_cells(row) for row in rows], left=2, classes={5: "strong"})
        for rows in (comparison.tasks, comparison.averages)
        if rows
    ]
    remarks = "".join(f"<li>{escape(remark)}</li>" for remark in comparison.remarks)
    measured = "".join(f"<h3>{escape(run['name'])}</h3>{definition_list(measurement_fields(run))}" for run in runs)
    sections = [
        ("", warnings),
        ("Differences", f"<p>{escape(NOTE)} {escape(left_out_text(comparison))}</p>{'<h3>Averages</h3>'.join(tables)}"),
        ("Differences by task", _forest_plot(comparison.tasks, labels)),
        ("Score by task", task_bars(runs)),
        ("Score by length", length_panels(runs)),
        ("Perplexity by position", perplexity_curves(runs)),
        ("What was measured", measured + (f"<h3>Differences of the runs</h3><ul>{remarks}</ul>" if remarks else "")),
    ]
    return html_page(f"{labels[0]} and {labels[1]}", "second minus first, sample by sample", sections)


def left_out_text(comparison: Comparison) -> str:
    """States how many samples are compared, and how many are left out for which reason."""
    text = f"{len(comparison.runs[0].samples):,} samples compared"
    if comparison.unmatched:
        text += "; left out: " + ", ".join(f"{count:,} {reason}" for reason, count in comparison.unmatched.items())
    return text + "."


def _forest_plot(rows: Sequence[Row], labels: Sequence[str]) -> str:
    bars = []
    for row in (row for row in rows if row.unit == "%"):
        interval = row.test.interval
        name = f"{row.name} {length_label(row.length)}" if row.length else row.name
        bars.append(Bar(name, 100 * row.test.difference, [100 * end for end in interval], f"Holm p {_p_text(row.holm_p)}"))
    if not bars:
        return ""
    ends = [end for bar in bars for end in bar.interval]
    chart = bar_chart("Difference by task", bars, nice_ticks(min(0, *ends), max(0, *ends), 6))
    return f"<p>{escape(labels[1])} minus {escape(labels[0])}, in percentage points, with 95 % confidence intervals.</p>{chart}"


def _header(a: str, b: str) -> list[str]:
    return ["task", "length", "n", a, b, "difference", "95 % interval", "p", "Holm p"]


def _cells(row: Row) -> list[str]:
    test = row.test
    scale, digits = (100, 1) if row.unit == "%" else (1, 3)
    signed = lambda value: f"{scale * value:+.{digits}f}" if round(scale * value, digits) else f"{0:.{digits}f}"  # noqa: E731
    interval = "–" if test.interval is None else " to ".join(map(signed, test.interval))
    return [
        row_name(row),
        length_label(row.length) if row.length else "",
        f"{test.num_pairs:,}",
        f"{scale * test.first:.{digits}f}",
        f"{scale * test.second:.{digits}f}",
        signed(test.difference),
        interval,
        _p_text(test.p_value),
        _p_text(row.holm_p) + ("*" if row.holm_p < SIGNIFICANT else ""),
    ]


def _p_text(value: float) -> str:
    return "<0.0001" if value < 0.0001 else f"{value:.4f}" if value < 0.01 else f"{value:.3f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Aligns columns for a terminal: the first to the left, the others, which are numbers, to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) if i == 0 else text.rjust(width) for i, (text, width) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    )
