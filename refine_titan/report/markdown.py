"""Shows the results of one or several runs as Markdown, in the layout of the paper's tables.

A table has a row for each run. Scores are in percent, with half the width of their 95 % confidence interval.
"""

import re
from collections.abc import Sequence

from refine_titan.report.paper_layout import (
    BENCHMARKS,
    LONGBENCH_TASKS,
    NIAH_GROUPS,
    OTHER_RULER_GROUPS,
    length_label,
    percent_with_interval,
)
from refine_titan.report.records import Record

ABSENT = "–"


def results_page(runs: Sequence[Record]) -> str:
    """Makes `results.md`: every table that the runs have numbers for, and what was measured."""
    tables = [
        ("RULER: needle in a haystack", _averages_table(runs, NIAH_GROUPS)),
        ("RULER: variable tracking, common words, frequent words", _averages_table(runs, OTHER_RULER_GROUPS)),
        ("RULER QA", _tasks_table(runs, "ruler_qa", all_metrics=True)),
        ("LongBench", _longbench_table(runs)),
        ("Own questions", _tasks_table(runs, "questions", all_metrics=True)),
        ("Perplexity", _perplexity_table(runs)),
    ]
    parts = ["# Results", "Percent, with half the width of the 95 % confidence interval. Tasks have equal weights in a mean."]
    parts += [f"## {title}\n\n{table}" for title, table in tables if table]
    if len(parts) == 2:
        parts.append("No sample was finished.")
    parts.append("## What was measured\n\n" + "\n".join(line for run in runs for line in measurement_list(run)))
    return "\n\n".join(parts) + "\n"


def measurement_list(run: Record) -> list[str]:
    """Makes a Markdown list of what the run measured, and how."""
    fields = measurement_fields(run)
    return [f"- **{as_text(run['name'])}**", *(f"  - {name}: {as_text(value)}" for name, value in fields)]


def measurement_fields(run: Record) -> list[tuple[str, str]]:
    """Lists (name, text) of what the run measured, and how."""
    counted = [row for row in run["tasks"] if row["num_samples"]]
    cut = sum(row["cut_prompts"] for row in counted)
    text = f"{sum(row['num_samples'] for row in counted):,} in {len({(row['benchmark'], row['task']) for row in counted})} tasks"
    if cut:
        text += f"; {cut:,} prompts were longer than allowed and were cut"
    unadapted = sum(row["unadapted_prompts"] for row in counted)
    if unadapted:
        text += f"; {unadapted:,} prompts were too short to adapt to and were answered as they are"
    fields = [
        ("checkpoint", run["checkpoint"]),
        ("model", " ".join(str(value) for value in run["model"].values())),
        ("weights, tokenizer", f"sha256 {str(run['weights_sha256'])[:16]}, {str(run['tokenizer_sha256'])[:16]}"),
        ("engine", str(run["engine"])),
        ("protocol", _settings(run["protocol"])),
        ("test-time training", describe_test_time_training(run)),
        ("seed", str(run["seed"])),
        ("samples", text),
    ]
    skipped = [f"{name}: {_settings(reasons)}" for name, reasons in skipped_rows(run).items()]
    if skipped:
        fields.append(("skipped rows", "; ".join(skipped)))
    empty = [f"{row['benchmark']}/{row['task']}" for row in run["tasks"] if not row["num_samples"]]
    if empty:
        fields.append(("without a sample", ", ".join(empty)))
    incomplete = [
        f"{name} over {len(group['tasks'])} of {len(group['tasks']) + len(group['missing_tasks'])}"
        for name, group in run["averages"].items()
        if group["missing_tasks"]
    ]
    if incomplete:
        fields.append(("averages that lack tasks", ", ".join(incomplete)))
    uneven = [name for name, group in run["averages"].items() if len({c["num_tasks"] for c in group["by_length"]}) > 1]
    if uneven:
        fields.append(("averages whose tasks differ by length", ", ".join(uneven)))
    if run["haystack"] not in (None, "", "none"):
        fields.append(("haystack", str(run["haystack"])))
    notes = [note for note in run.get("notes") or [] if not str(note).startswith("haystack: ")]
    if notes:
        fields.append(("notes", "; ".join(map(str, notes))))
    return fields


def skipped_rows(run: Record) -> dict[str, Record]:
    """Numbers of unusable rows of files, by task and reason."""
    by_task = {f"{row['benchmark']}/{row['task']}": row["skipped"] for row in run["tasks"] if row["skipped"]}
    return {name: reasons for name, reasons in ({**(run.get("skipped") or {}), **by_task}).items() if reasons}


def describe_test_time_training(run: Record) -> str:
    """Describes test-time training: "none", or whether the model was reset between batches of prompts, and the settings."""
    settings = run["phase"].get("test_time_training")
    if not settings:
        return "none"
    others = _settings({name: value for name, value in settings.items() if name != "carry_over"})
    way = "weights and optimizer reset after every batch"
    if settings.get("carry_over"):
        way = (
            "weights and optimizer CARRIED OVER from batch to batch: scores depend on the order of samples, and intervals do not "
            "account for that"
        )
    return f"{way}; {others}" if others else way


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Makes a Markdown table. The first `left` columns are text, the others numbers."""
    align = [":--" if i < left else "--:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(as_text(text) for text in row) + " |" for row in (header, align, *rows))


def _averages_table(runs: Sequence[Record], names: Sequence[str]) -> str:
    columns: list[tuple[str, int | None | str]] = []
    for name in names:
        lengths = sorted(
            {cell["length"] for run in runs if name in run["averages"] for cell in run["averages"][name]["by_length"]},
            key=lambda length: length or 0,
        )
        columns += [(name, length) for length in lengths] + ([(name, "mean")] if len(lengths) > 1 else [])
    if not columns:
        return ""
    header = ["run", *(f"{name} {where if where == 'mean' else length_label(where)}" for name, where in columns)]
    return markdown_table(header, [[run["name"], *(_average(run, *column) for column in columns)] for run in runs])


def _average(run: Record, name: str, where: int | None | str) -> str:
    group = run["averages"].get(name)
    if group is None:
        return ABSENT
    cells = [group["mean"]] if where == "mean" else [cell for cell in group["by_length"] if cell["length"] == where]
    if not cells:
        return ABSENT
    total = len(group["tasks"]) + len(group["missing_tasks"])
    part = f" ({len(group['tasks'])} of {total} tasks)" if group["missing_tasks"] else ""
    return percent_with_interval(cells[0]["score"], cells[0]["ci95"]) + part


def _tasks_table(runs: Sequence[Record], benchmark: str, all_metrics: bool) -> str:
    columns = list(
        dict.fromkeys(
            (row["task"], row["length"], metric)
            for run in runs
            for row in run["tasks"]
            if row["benchmark"] == benchmark and row["num_samples"]
            for metric in (row["metrics"] if all_metrics else [row["metric"]])
        )
    )
    if not columns:
        return ""
    header = ["run", *(f"{task}{f' {length_label(length)}' if length else ''}, {metric}" for task, length, metric in columns)]
    body = []
    for run in runs:
        rows = {(row["task"], row["length"]): row for row in run["tasks"] if row["benchmark"] == benchmark}
        cells = [rows.get((task, length), {"metrics": {}})["metrics"].get(metric) for task, length, metric in columns]
        body.append([run["name"], *(ABSENT if m is None else percent_with_interval(m["mean"], m["ci95"]) for m in cells)])
    return markdown_table(header, body)


def _longbench_table(runs: Sequence[Record]) -> str:
    found = {mean["task"] for run in runs for mean in run["task_means"] if mean["benchmark"] == "longbench"}
    tasks = [task for task in LONGBENCH_TASKS if task in found] + sorted(found - set(LONGBENCH_TASKS))
    if not tasks:
        return ""
    body = []
    for run in runs:
        means = {mean["task"]: mean for mean in run["task_means"] if mean["benchmark"] == "longbench"}
        cells = [percent_with_interval(means[t]["score"], means[t]["ci95"]) if t in means else ABSENT for t in tasks]
        body.append([run["name"], *cells, _average(run, "LongBench", "mean")])
    return markdown_table(["run", *tasks, "average"], body)


def _perplexity_table(runs: Sequence[Record]) -> str:
    body = [
        [run["name"], row["task"], length_label(row["length"]), str(row["num_samples"]), perplexity_with_interval(row)]
        for run in runs
        for row in run["tasks"]
        if row["benchmark"] == "perplexity" and row["num_samples"]
    ]
    return markdown_table(["run", "task", "length", "documents", BENCHMARKS["perplexity"]], body, left=2) if body else ""


def perplexity_with_interval(row: Record) -> str:
    """`12.31 (11.90 to 12.80)`: perplexity of a row with its interval."""
    interval = "" if row["ci95"] is None else f" ({row['ci95'][0]:.2f} to {row['ci95'][1]:.2f})"
    return f"{row['score']:.2f}{interval}"


def _settings(values: Record) -> str:
    return ", ".join(f"{name} {str(value).lower() if isinstance(value, bool) else value}" for name, value in values.items())


def as_text(text: str) -> str:
    """Escapes text, so that it neither ends a table's cell nor becomes markup, a link or an image."""
    text = "".join(c if c.isprintable() else " " for c in str(text)).replace("&", "&amp;").replace("<", "&lt;")
    # Addresses become links without brackets too.
    return re.sub(r"[\\|`\[\]@]|(?<=www)\.|:(?=//)", r"\\\g<0>", text, flags=re.IGNORECASE)
