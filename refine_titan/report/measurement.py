"""Says what an evaluation run measured, and how."""

from refine_titan.report.records import Record


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
        ("model", " ".join(str(value) for name, value in run["model"].items() if name != "args")),
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


def _settings(values: Record) -> str:
    return ", ".join(f"{name} {str(value).lower() if isinstance(value, bool) else value}" for name, value in values.items())
