"""Makes a page's sections about a training run: its curves, its evaluations on the way, and its rollouts to read."""

import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from refine_titan.errors import UserError
from refine_titan.files.json_lines import DamagedLines, read_records
from refine_titan.monitoring.metric_names import TOKENS_PER_SECOND, VALIDATION, read_metrics, validation_name
from refine_titan.report.axes import axis_over, step_axis
from refine_titan.report.charts import Chart, Line, line_chart, number
from refine_titan.report.escaping import escape
from refine_titan.report.page import figures, tiles
from refine_titan.report.rollout_browser import rollout_browser

METRICS_FILE, VALIDATION_FILE, ROLLOUTS_FILE = "metrics.jsonl", "validation.jsonl", "rollouts.jsonl"


class Curve(NamedTuple):
    """A metric of `metrics.jsonl` that is drawn: its key there, its title, and its unit."""

    key: str
    title: str
    unit: str


CURVES = (
    Curve("refine/ntp_loss", "next-token loss", "nats a token"),
    Curve("rollout/reward_mean", "reward", "mean of a step"),
    Curve("rollout/match_mean", "rollout tokens that match", "share"),
    Curve("refine/answer_loss", "answer loss", "nats a token"),
    Curve("rollout/task_reward", "task reward", "mean of a step"),
    Curve("grad_norm", "gradient norm", "before clipping"),
)
FURTHER_CURVES = (
    Curve("lr", "learning rate", ""),
    Curve("rollout/entropy", "entropy of rollout tokens", "nats"),
    Curve("rollout/logprob_gap_max", "largest gap of log-probabilities, engine and trainer", "nats"),
    Curve(TOKENS_PER_SECOND, "tokens a second", "all ranks"),
    Curve("memory/max_active(GiB)", "peak memory of rank 0", "GiB"),
)
# Those whose beginning and end the page's first lines compare.
SUMMARY = ("refine/ntp_loss", "rollout/reward_mean", "rollout/match_mean", "refine/answer_loss", "rollout/task_reward")
# Points of a curve, and most steps that one of them is the median of.
MAX_POINTS, MAX_WINDOW = 300, 1000
# Most curves of `validation.jsonl`, which has one for each task and length.
MAX_VALIDATION_CURVES = 24
UNITS_OF_DOCUMENTS = {"loss": "nats a token", "accuracy": "share of next tokens", "perplexity": ""}


def training_sections(folder: Path) -> list[tuple[str, str]]:
    """Makes sections (heading, HTML) from a training run's folder. Damaged lines are left out, which the page and a warning say.

    Raises:
        UserError: if the folder's metrics are missing or those of another program.
    """
    # The metrics of a long run take more memory than all that is drawn of them; they are gone before the rollouts are read.
    return [
        ("Training", _training(folder)),
        ("Evaluations during training", _validation(folder / VALIDATION_FILE)),
        ("Rollouts", rollout_browser(folder / ROLLOUTS_FILE)),
    ]


def training_charts(folder: Path) -> list[Chart]:
    """Makes the curves of a run's metrics, and those of its evaluations on the way.

    Raises:
        UserError: as `training_sections`.
    """
    columns, damaged = _metrics(folder)
    damaged.warn()
    own, further = (_curves(columns, curves) for curves in (CURVES, FURTHER_CURVES))
    return [*own, *further, *_validation_charts(folder / VALIDATION_FILE, DamagedLines(folder / VALIDATION_FILE))]


def _training(folder: Path) -> str:
    columns, damaged = _metrics(folder)
    steps_n = columns["step"]
    if not len(steps_n):
        return f"<p>{escape(folder / METRICS_FILE)} holds no finished step.</p>"
    intro = f'<p class="path">{escape(folder)}, steps {steps_n[0]:,.0f} to {steps_n[-1]:,.0f}</p>{_tiles(columns)}{_left_out(damaged)}'
    if _window(steps_n) > 1:
        intro += f"<p>Bold: median over {_window(steps_n):,} neighbouring steps.</p>"
    charts, further = (figures(_curves(columns, curves)) for curves in (CURVES, FURTHER_CURVES))
    more = f"<details><summary>Further curves</summary>{further}</details>" if further else ""
    return intro + charts + more


def _metrics(folder: Path) -> tuple[dict[str, np.ndarray], DamagedLines]:
    """Reads the metrics that are drawn; the lines that cannot be read are in the second value."""
    path = folder / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{folder} is no folder of a training run: it has no {METRICS_FILE}")
    damaged = DamagedLines(path)
    columns = read_metrics(path, [curve.key for curve in (*CURVES, *FURTHER_CURVES)], damaged)
    if damaged and not len(columns["step"]):
        raise UserError(f"{path} holds no steps of a training run; line {damaged.numbers[0]}: {damaged.first_reason}")
    return columns, damaged


def _curves(columns: dict[str, np.ndarray], curves: Sequence[Curve]) -> list[Chart]:
    steps_n = columns["step"]
    return [chart for curve in curves for chart in _curve(steps_n, columns[curve.key], _window(steps_n), curve)]


def _window(steps_n: np.ndarray) -> int:
    """Steps of which a point of a curve is the median."""
    return min(len(steps_n) // 20, MAX_WINDOW) if len(steps_n) >= 60 else 1


def _left_out(damaged: DamagedLines) -> str:
    damaged.warn()
    return f"<p>{escape(damaged)}.</p>" if damaged else ""


def _tiles(columns: dict[str, np.ndarray]) -> str:
    """Makes tiles with the means of the last fifth of the steps, and of the first below."""
    fifth, shown = max(len(columns["step"]) // 5, 1), []
    for curve in CURVES:
        first, last = (part[~np.isnan(part)] for part in (columns[curve.key][:fifth], columns[curve.key][-fifth:]))
        if curve.key in SUMMARY and len(first) and len(last):
            shown.append((curve.title, number(float(last.mean())), f"first fifth {number(float(first.mean()))}"))
    return tiles(shown) + "<p>Means of the last fifth of the steps.</p>" if shown else ""


def _validation(path: Path) -> str:
    damaged = DamagedLines(path)
    charts = figures(_validation_charts(path, damaged))
    return _left_out(damaged) + charts if charts else ""


def _validation_charts(path: Path, damaged: DamagedLines) -> list[Chart]:
    steps, values = array("d"), {}
    for _, record in read_records(path, dict[str, float | None], damaged):
        step = record.pop("step", None)
        if step is None:
            continue
        for name, value in ((validation_name(name), value) for name, value in record.items()):
            if not name.startswith(VALIDATION) or name.startswith(f"{VALIDATION}memory/"):
                continue
            if name in values or len(values) < MAX_VALIDATION_CURVES:
                column = values.setdefault(name, array("d"))
                column.extend([math.nan] * (len(steps) - len(column)))
                column.append(math.nan if value is None else value)
        steps.append(step)
    charts = []
    for name, column in values.items():
        column.extend([math.nan] * (len(steps) - len(column)))
        title = name.removeprefix(VALIDATION)
        unit = UNITS_OF_DOCUMENTS.get(title, "score")
        charts += _curve(np.frombuffer(steps), np.frombuffer(column), 1, Curve(name, title, unit))
    return charts


def _curve(steps_n: np.ndarray, values_n: np.ndarray, window: int, curve: Curve) -> list[Chart]:
    """Makes the chart of a metric; none if no step has it."""
    has_value = ~np.isnan(values_n)
    x_n, y_n = steps_n[has_value], values_n[has_value]
    if not len(x_n):
        return []
    smooth, raw = _moving_median(x_n, y_n, window), _thin(x_n, y_n)
    lines = [Line(curve.title, smooth)] + ([Line(curve.title, raw, faint=True)] if window > 1 else [])
    # A spike would flatten the rest of the curve, so the axis spans 98 % of the values and cuts the curve there.
    values = sorted(y for _, y in raw)
    cut = len(values) // 50
    y_axis = axis_over((values[cut], values[-1 - cut], *(y for _, y in smooth)), 4)
    x_axis = step_axis(float(x_n[0]), float(x_n[-1]))
    return [line_chart(curve.title, lines, y_axis, x_axis, (curve.unit, "step"), size=(430, 200))]


def _moving_median(x_n: np.ndarray, y_n: np.ndarray, window: int) -> list[tuple[float, float]]:
    """Takes at most MAX_POINTS points, each the median of the `window` points around it (fewer at both ends)."""
    before, stride = window // 2, -(-len(x_n) // MAX_POINTS)
    return [(float(x_n[i]), float(np.median(y_n[max(0, i - before) : i - before + window]))) for i in range(0, len(x_n), stride)]


def _thin(x_n: np.ndarray, y_n: np.ndarray) -> list[tuple[float, float]]:
    """Reduces a curve to at most MAX_POINTS points, each the mean of neighbouring points."""
    size = -(-len(x_n) // MAX_POINTS)
    return [(float(x_n[i : i + size].mean()), float(y_n[i : i + size].mean())) for i in range(0, len(x_n), size)]
