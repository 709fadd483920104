"""Shows the results of experiments as Markdown, LaTeX and an HTML page."""

from collections.abc import Iterator, Sequence

from refine_titan.report.escaping import as_text, escape
from refine_titan.report.page import definition_list, figure, figures, html_page, html_table, legend
from refine_titan.report.replicates import Estimate
from refine_titan.report.tables import Table, latex_page, markdown_table
from refine_titan.reproduction.charts import (
    FORKS_OF_A_LINE,
    difference_over_forks,
    difference_over_gain,
    main_chart,
    pair_names,
    training_charts,
)
from refine_titan.reproduction.experiment import Experiment
from refine_titan.reproduction.measures import is_loss, is_share
from refine_titan.reproduction.results import ANSWERS, MIN_SEEDS, Results, by_pair

TITLE = "Arms from one checkpoint"
NOTE = (
    "Means over seeds ±half the width of the 95 % confidence interval (Student's t); scores in percent, losses in nats a token, where "
    "lower is better. Each seed draws its own training documents, rollouts and test samples; within a seed, all rows of a table are "
    "measured on the same samples. Seeds draw from the same files, if the data are files: no interval covers the choice of these. "
    "Differences are taken seed by seed. The corrected interval and the Holm p hold for all comparisons of the file of arms together, "
    "also those that were not chosen (Bonferroni, Holm), all others for one number alone. n a seed: samples, or tokens of a text, of "
    "which the primary measure of a seed is the mean; s a sample: seconds to answer it, with its test-time training."
)
RULE = (
    "The answer is yes if the corrected interval of the primary measure's difference lies on the good side of zero, no if it lies on the "
    f"other side, and undecided otherwise, with fewer than {MIN_SEEDS} seeds, and as long as a seed that was asked for is not finished."
)

# Tables with more columns have a row for each measure instead.
MOST_COLUMNS = 11
# With more comparisons than that, a sentence sums them up.
FEW_SENTENCES = 3


def headlines(found: Results) -> list[str]:
    """Says the answer to each comparison in a sentence, after one that counts them if there are many."""
    sentences = [_headline(found, pairs) for pairs in by_pair(found)] or ["No comparison was asked for."]
    summary = [_summary(found)] if len(sentences) > FEW_SENTENCES else []
    return [*summary, *sentences, *_warnings(found)]


def markdown_page(experiments: Sequence[Results]) -> str:
    """Makes a Markdown page of several experiments' results."""
    parts = [f"# {TITLE}", NOTE, RULE]
    for found in experiments:
        parts += [f"## {as_text(found['name'])}", *map(as_text, headlines(found))]
        parts += [f"### {as_text(table.title)}\n\n{markdown_table(table.header, table.rows, table.left)}" for table in tables(found)]
    return "\n\n".join(parts) + "\n"


def latex(experiments: Sequence[Results]) -> str:
    """Makes the same tables for LaTeX."""
    return latex_page((table for found in experiments for table in tables(found)), NOTE)


def html(experiments: Sequence[Experiment], results: Sequence[Results]) -> str:
    """Makes the page with the charts."""
    sections = [("", f"<p>{escape(NOTE)}</p><p>{escape(RULE)}</p>")]
    for experiment, found in zip(experiments, results):
        sections += _sections(experiment, found, f"{found['name']}: " if len(results) > 1 else "")
    return html_page(TITLE, ", ".join(found["name"] for found in results), sections)


def tables(found: Results) -> list[Table]:
    """The tables of an experiment: the answers, and for each fork the measures of the arms and their differences."""
    made = [_answers(found)] if found["comparisons"] else []
    for fork in found["forks"]:
        where = f"from step {fork:,} of the start"
        made.append(Table(f"Measures {where}", *_turned(*_measures(found, fork))))
        pairs = [pair for pair in found["comparisons"] if pair["fork"] == fork]
        if pairs:
            header = ["difference", *found["measures"]]
            rows = [
                [_pair_name(found, pair), *(_difference(pair["differences"][name], name) for name in found["measures"])] for pair in pairs
            ]
            made.append(Table(f"Differences {where}, p not corrected", *_turned(header, rows)))
    return made


def _sections(experiment: Experiment, found: Results, prefix: str) -> Iterator[tuple[str, str]]:
    answers, *others = tables(found) if found["comparisons"] else [None, *tables(found)]
    chart = main_chart(found)
    first, *more = [escape(sentence) for sentence in headlines(found)]
    top = f'<p class="headline">{first}</p>' + "".join(f"<p>{sentence}</p>" for sentence in more)
    names, baseline = [arm["label"] for arm in list(found["arms"].values())[1:]], found["arms"][found["baseline"]]["label"]
    keys, pair_keys = legend(names), legend(pair_names(found))
    if chart is not None:
        top += _html_table(answers, strong=2) + (pair_keys if len(found["forks"]) >= FORKS_OF_A_LINE else "") + figure(chart)
    yield f"{prefix}Answers", top
    yield (
        f"{prefix}Measures",
        "".join(f"<h3>{escape(table.title)}</h3>{_html_table(table, strong=0 if table.header[0] == 'measure' else 1)}" for table in others),
    )
    if len(found["forks"]) > 1 and found["comparisons"]:
        over = [difference_over_forks(found, name, name) for name in found["measures"]]
        gains = [difference_over_gain(found, name) for name in found["measures"]]
        yield f"{prefix}Differences over the start's steps", pair_keys + figures(over)
        intro = f"<p>Where the baseline still gains much, next-token training still teaches much. The baseline is {escape(baseline)}.</p>"
        yield f"{prefix}Differences over what the baseline still gains", intro + pair_keys + figures(gains)
    courses = [f"<h3>From step {fork:,} of the start</h3>{figures(training_charts(experiment, fork))}" for fork in found["forks"]]
    yield f"{prefix}Course of the trainings", keys + "".join(courses)
    yield f"{prefix}Arms", definition_list((arm["label"], _settings(arm)) for arm in found["arms"].values())


def _html_table(table: Table, strong: int = 1) -> str:
    return html_table(table.header, table.rows, table.left, {strong: "strong"}, table.title)


def _settings(arm: dict[str, str]) -> str:
    own = [arm["settings"], f"measured with {arm['measured_with']}" if arm.get("measured_with") else ""]
    return "; ".join(text for text in own if text) or "as in continue.toml"


def _warnings(found: Results) -> list[str]:
    """What a reader must know before the answers are believed."""
    warnings = []
    if found["missing_seeds"]:
        missing = ", ".join(map(str, found["missing_seeds"]))
        warnings.append(f"Not finished: seeds {missing} of {len(found['seeds']) + len(found['missing_seeds'])}. Nothing is decided before.")
    for pair in found["comparisons"]:
        if pair["matched"] == "compute" and not pair["same_compute"]:
            what = (
                "the second took no time" if pair["seconds_ratio"] is None else f"the first took {pair['seconds_ratio']:.2f} times as long"
            )
            warnings.append(f"Not matched in compute, from step {pair['fork']:,}: {_pair_name(found, pair)}; {what}.")
    if len(found["commits"]) > 1:
        commits = ", ".join(commit[:9] for commit in found["commits"])
        warnings.append(f"The stages ran at different revisions of this program ({commits}); another --output runs them all again.")
    return warnings


def _summary(found: Results) -> str:
    pairs = found["comparisons"]
    counts = ", ".join(f"{sum(pair['answer'] == kind for pair in pairs)} {kind}" for kind in ANSWERS)
    return f"{len(pairs)} comparisons by {found['primary']}, corrected for {pairs[0]['corrected']['number']}: {counts}."


def _headline(found: Results, pairs: Sequence[dict]) -> str:
    primary, first = found["primary"], pairs[0]
    arm, against = (found["arms"][first[key]]["label"] for key in ("arm", "against"))
    answers = []
    for pair in pairs:
        size = f"{_signed(pair['differences'][primary]['mean'], primary)}{_width(pair['corrected']['half_width'], primary)}"
        answers.append(f"{'from' if answers else 'From'} step {pair['fork']:,}: {pair['answer']} ({size})")
    few = f" Fewer than {MIN_SEEDS} seeds decide nothing." if len(found["seeds"]) < MIN_SEEDS else ""
    many, seeds = first["corrected"]["number"], len(found["seeds"])
    return (
        f"Is “{arm}” better than “{against}” by {primary}{' (lower is better)' if is_loss(primary) else ''}? "
        f"{'; '.join(answers)}; {seeds} seed{'s' if seeds > 1 else ''}, corrected for {many} comparison{'s' if many > 1 else ''}.{few}"
    )


def _answers(found: Results) -> Table:
    primary, rows = found["primary"], []
    for pair in found["comparisons"]:
        test, corrected = pair["differences"][primary], pair["corrected"]
        rows.append(
            [
                _pair_name(found, pair),
                f"{pair['fork']:,}",
                pair["answer"],
                _signed(test["mean"], primary),
                _interval(test["mean"], test["half_width"], primary),
                _interval(test["mean"], corrected["half_width"], primary),
                _p_text(test["p_value"]),
                _p_text(corrected["p_value"]),
                _same(pair),
                "–" if pair["steps_of_equal_seconds"] is None or pair["same_compute"] else f"{pair['steps_of_equal_seconds']:,}",
            ]
        )
    header = [
        "comparison",
        "from step",
        "better?",
        "difference",
        "95 %",
        "corrected 95 %",
        "p",
        "Holm p",
        "same",
        "equal seconds",
    ]
    return Table(f"Answers by {primary}", header, rows)


def _same(pair: dict) -> str:
    """What two trainings have equal, and the ratio of their seconds."""
    same = [name for name in ("steps", "tokens", "compute") if pair[f"same_{name}"]]
    ratio = [] if pair["seconds_ratio"] is None else [f"seconds ×{pair['seconds_ratio']:.2f}"]
    return ", ".join(same + ratio) or "–"


def _measures(found: Results, fork: int) -> tuple[list[str], list[list[str]]]:
    header = ["", *found["measures"], "steps", "tokens", "seconds", "n a seed", "s a sample"]
    rows = []
    for arm in found["costs"][fork]:
        about = found["arms"][arm]
        cost, by_name = found["costs"][fork][arm], found["estimates"][fork][arm]
        costs = [f"{cost['steps']:,}", f"{cost['tokens']:,}", f"{cost['seconds']:.0f}"] if cost["steps"] else ["–"] * 3
        sampling = found["samplings"][fork][arm]
        costs += [f"{sampling['terms']:,}", "–" if sampling["seconds"] is None else f"{sampling['seconds']:.2f}"]
        rows.append([about["label"], *(_value(by_name[name], name) for name in found["measures"]), *costs])
    return header, rows


def _turned(header: list[str], rows: list[list[str]]) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """A table with a row for each measure, if it would be wide with a column for each."""
    if len(header) <= MOST_COLUMNS:
        return header, rows
    first, *others = zip(header, *rows)
    return ["measure", *first[1:]], others


def _pair_name(found: Results, pair: dict) -> str:
    own = f"{pair['label']}: " if pair["label"] else ""
    return own + f"{found['arms'][pair['arm']]['label']} − {found['arms'][pair['against']]['label']}"


def _scaled(value: float, measure: str) -> str:
    scale, digits = (100, 1) if is_share(measure) else (1, 4)
    return f"{round(scale * value, digits) + 0.0:.{digits}f}"  # adding 0.0 turns -0.0 into 0.0


def _signed(value: float, measure: str) -> str:
    text = _scaled(value, measure)
    return text if text.startswith("-") or not float(text) else f"+{text}"


def _width(half_width: float | None, measure: str) -> str:
    return "" if half_width is None else f" ±{_scaled(half_width, measure)}"


def _value(estimate: dict, measure: str) -> str:
    found = Estimate(**estimate)
    return _scaled(found.mean, measure) + _width(found.half_width, measure)


def _difference(estimate: dict, measure: str) -> str:
    found = Estimate(**estimate)
    p_value = "" if found.p_value is None else f" (p {_p_text(found.p_value)})"
    return _signed(found.mean, measure) + _width(found.half_width, measure) + p_value


def _interval(mean: float, half_width: float | None, measure: str) -> str:
    return "–" if half_width is None else f"{_signed(mean - half_width, measure)} to {_signed(mean + half_width, measure)}"


def _p_text(value: float | None) -> str:
    return "–" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"
