"""Shows a comparison of two runs as text, Markdown, LaTeX, CSV, charts and an HTML page."""

from collections.abc import Sequence

from refine_titan.errors import printable
from refine_titan.report.axes import axis_over
from refine_titan.report.charts import Bar, Chart, bar_chart
from refine_titan.report.comparison import Comparison, Row, row_name
from refine_titan.report.escaping import as_text, escape
from refine_titan.report.measurement import measurement_fields
from refine_titan.report.page import definition_list, figure, figures, html_page, html_table, legend
from refine_titan.report.paper_layout import length_label
from refine_titan.report.records import Record
from refine_titan.report.result_charts import length_panels, perplexity_curves, result_charts, task_bars
from refine_titan.report.results import aggregate
from refine_titan.report.tables import Table, csv_page, latex_page, markdown_table

SIGNIFICANT = 0.05
NOTE = (
    "Scores are in percent, perplexity tasks in nats a token (lower is better). Difference: second minus first, over the samples "
    "that both runs have. p: permutation test. Holm p: p corrected for the number of rows of its table; * marks values below 0.05."
)
CSV_HEADER = (
    "benchmark",
    "task",
    "length",
    "unit",
    "num_pairs",
    "first",
    "second",
    "difference",
    "ci95_low",
    "ci95_high",
    "p_value",
    "holm_p_value",
)


def headlines(comparison: Comparison, first: str | None = None, second: str | None = None) -> list[str]:
    """Says the overall differences in a sentence each: `B is 3.5 points lower than A, p 0.10, n 1,000 (mean of 12 tasks) ...`.

    Args:
        first, second: names of the two runs; their labels if not given.
    """
    names = [name or run.label for name, run in zip((first, second), comparison.runs)]
    return [_headline(row, *names) for row in comparison.overall]


def _headline(row: Row, first: str, second: str) -> str:
    test, is_score = row.test, row.unit == "%"
    scale, digits, unit = (100, 1, "points") if is_score else (1, 3, "nats a token")
    size = round(abs(scale * test.difference), digits)
    facts = f"p {_p_in_words(test.p_value)}, n {test.num_pairs:,} ({row.name})"
    if not size:
        what = f"{second} and {first} have the same {'score' if is_score else 'loss'} to {10**-digits:g} {unit}"
        return f"{what}, {facts}."
    way = "higher" if test.difference > 0 else "lower"
    loss = "" if is_score else "'s loss"
    by_chance = "" if test.p_value < SIGNIFICANT else " A difference of this size may be chance."
    return f"{second}{loss} is {size:.{digits}f} {unit} {way} than {first}{'' if is_score else chr(39) + 's'}, {facts}.{by_chance}"


def _p_in_words(value: float) -> str:
    """`0.10`; two digits are enough in a sentence."""
    return "below 0.0001" if value < 0.0001 else f"{value:.2g}" if value < 0.01 else f"{value:.2f}"


def text_report(comparison: Comparison) -> str:
    """Formats the tables for a terminal, without warnings and remarks."""
    labels = (printable(run.label) for run in comparison.runs)
    parts = ["A = {}\nB = {}".format(*labels), "\n".join(headlines(comparison, "A", "B")), left_out_text(comparison)]
    for rows in (comparison.tasks, comparison.averages):
        if rows:
            parts.append(_aligned([_header("A", "B"), *map(_cells, rows)]))
    return "\n\n".join(part for part in parts if part) + f"\n\n{NOTE}"


def markdown_report(comparison: Comparison) -> str:
    """Formats the tables, warnings and remarks as Markdown."""
    a, b = (run.label for run in comparison.runs)
    parts = [f"# {as_text(a)} and {as_text(b)}", *map(as_text, headlines(comparison)), NOTE]
    parts += [f"- **Warning:** {as_text(warning)}" for warning in comparison.warnings]
    parts += [f"## {table.title}\n\n{markdown_table(table.header, table.rows, table.left)}" for table in _tables(comparison)]
    parts += [left_out_text(comparison), *(f"- {as_text(remark)}" for remark in comparison.remarks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def latex_report(comparison: Comparison) -> str:
    """Formats the tables for a paper."""
    return latex_page(_tables(comparison), NOTE)


def csv_report(comparison: Comparison) -> str:
    """Lists every row of the tables, and the overall differences, with all digits. Scores are from 0 to 1, losses in nats a token."""
    kinds = [(comparison.tasks, None), (comparison.averages, "average"), (comparison.overall, "overall")]
    return csv_page(CSV_HEADER, [_csv_row(row, kind or row.benchmark) for rows, kind in kinds for row in rows])


def _csv_row(row: Row, benchmark: str) -> list[object]:
    test, unit = row.test, "score" if row.unit == "%" else row.unit
    numbers = [test.num_pairs, test.first, test.second, test.difference, *(test.interval or (None, None)), test.p_value, row.holm_p]
    return [benchmark, row.name, row.length, unit, *numbers]


def comparison_charts(comparison: Comparison) -> list[Chart]:
    """Makes every chart of the HTML page."""
    return [*_forest_plot(comparison), *result_charts(_aggregated(comparison))]


def html_report(comparison: Comparison) -> str:
    """Makes the HTML page. Its charts show the samples that both runs have."""
    runs = _aggregated(comparison)
    labels = [run["name"] for run in runs]
    top = "".join(f'<p class="headline">{escape(sentence)}</p>' for sentence in headlines(comparison))
    top += "".join(f'<p class="warning">{escape(warning)}</p>' for warning in comparison.warnings)
    tables = [
        f"<h3>{table.title}</h3>" + html_table(table.header, table.rows, table.left, {5: "strong"}, table.title)
        for table in _tables(comparison)
    ]
    remarks = "".join(f"<li>{escape(remark)}</li>" for remark in comparison.remarks)
    measured = "".join(f"<h3>{escape(run['name'])}</h3>{definition_list(measurement_fields(run))}" for run in runs)
    keys = legend(labels)
    sections = [
        ("", top),
        ("Differences", f"<p>{escape(NOTE)} {escape(left_out_text(comparison))}</p>{''.join(tables)}"),
        ("Differences by task", "".join(map(figure, _forest_plot(comparison)))),
        ("Score by task", _with_keys(keys, "".join(map(figure, task_bars(runs))))),
        ("Score by length", _with_keys(keys, figures(length_panels(runs)))),
        ("Perplexity by position", _with_keys(keys, "".join(map(figure, perplexity_curves(runs))))),
        ("What was measured", measured + (f"<h3>Differences of the runs</h3><ul>{remarks}</ul>" if remarks else "")),
    ]
    return html_page(f"{labels[0]} and {labels[1]}", "second minus first, sample by sample", sections)


def _with_keys(keys: str, charts: str) -> str:
    return keys + charts if charts else ""


def _aggregated(comparison: Comparison) -> list[Record]:
    return [aggregate(run.record, run.samples) | {"name": run.label} for run in comparison.runs]


def _tables(comparison: Comparison) -> list[Table]:
    header = _header(*(run.label for run in comparison.runs))
    kinds = (("Tasks", comparison.tasks), ("Averages", comparison.averages))
    return [Table(title, header, [_cells(row) for row in rows], left=2) for title, rows in kinds if rows]


def left_out_text(comparison: Comparison) -> str:
    """States how many samples are compared, and how many are left out for which reason."""
    text = f"{len(comparison.runs[0].samples):,} samples compared"
    if comparison.unmatched:
        text += "; left out: " + ", ".join(f"{count:,} {reason}" for reason, count in comparison.unmatched.items())
    return text + "."


def _forest_plot(comparison: Comparison) -> list[Chart]:
    bars = []
    for row in (row for row in comparison.tasks if row.unit == "%"):
        interval = row.test.interval
        name = f"{row.name} {length_label(row.length)}" if row.length else row.name
        bars.append(Bar(name, 100 * row.test.difference, [100 * end for end in interval], f"Holm p {_p_text(row.holm_p)}"))
    if not bars:
        return []
    axis = axis_over((end for bar in bars for end in bar.interval), 6, with_zero=True)
    first, second = (run.label for run in comparison.runs)
    return [bar_chart(f"{second} minus {first}, in percentage points, with 95 % confidence intervals", bars, axis, "points")]


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
