"""Makes the report's sections about a training run: its curves, and rollouts to read."""

from array import array
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from refine_titan.errors import UserError
from refine_titan.files.json_lines import DamagedLines, Decoder, StepNumber, read_records
from refine_titan.monitoring.metric_names import read_metrics
from refine_titan.report.charts import Line, escape, line_chart, nice_ticks

CURVES = (
    ("refine/ntp_loss", "next-token loss", "nats a token"),
    ("rollout/reward_mean", "reward", "mean of a step"),
    ("rollout/match_mean", "rollout tokens that match", "share"),
    ("refine/answer_loss", "answer loss", "nats a token"),
    ("rollout/task_reward", "task reward", "mean of a step"),
    ("grad_norm", "gradient norm", "before clipping"),
)
MAX_POINTS = 300
# Steps whose rollouts are shown, and rollouts shown of each.
SHOWN_STEPS, SHOWN_ROLLOUTS = 6, 4


class _Rollout(msgspec.Struct):
    """What the report shows of a line of `rollouts.jsonl`."""

    step: StepNumber
    document: str
    position: int
    prefix_tail: str
    rollout: str
    truth: str
    reward: float | None  # a value that was not finite is null in the file
    advantage: float | None


def training_sections(folder: Path) -> list[tuple[str, str]]:
    """Makes sections (heading, HTML) from a training run's folder. Damaged lines are left out, which the page and a warning say.

    Raises:
        UserError: if the folder's metrics are missing or those of another program.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder} is no folder of a training run: it has no metrics.jsonl")
    damaged = DamagedLines(path)
    columns = read_metrics(path, [name for name, *_ in CURVES], damaged)
    steps_n = columns["step"]
    if not len(steps_n):
        if damaged:
            raise UserError(f"{path} holds no steps of a training run; line {damaged.numbers[0]}: {damaged.first_reason}")
        return [("Training", f"<p>{escape(path)} holds no finished step.</p>")]
    window = len(steps_n) // 20 if len(steps_n) >= 60 else 1
    intro = f'<p class="path">{escape(folder)}, steps {steps_n[0]:,.0f} to {steps_n[-1]:,.0f}</p>' + _left_out(damaged)
    if window > 1:
        intro += f"<p>Bold: median over {window} neighbouring steps.</p>"
    charts = "".join(_curve(steps_n, columns[name], window, title, unit) for name, title, unit in CURVES)
    return [("Training", f'{intro}<div class="panels">{charts}</div>'), ("Rollouts", _rollouts(folder / "rollouts.jsonl"))]


def _left_out(damaged: DamagedLines) -> str:
    damaged.warn()
    return f"<p>{escape(damaged)}.</p>" if damaged else ""


def _curve(steps_n: np.ndarray, values_n: np.ndarray, window: int, title: str, unit: str) -> str:
    has_value = ~np.isnan(values_n)
    x_n, y_n = steps_n[has_value], values_n[has_value]
    if not len(x_n):
        return ""
    smooth, raw = _moving_median(x_n, y_n, window), _thin(x_n, y_n)
    lines = [Line(title, smooth)] + ([Line(title, raw, faint=True)] if window > 1 else [])
    # A spike would flatten the rest of the curve, so the axis spans 98 % of the values and cuts the curve there.
    values = sorted(y for _, y in raw)
    cut = len(values) // 50
    y_ticks = nice_ticks(min(values[cut], *(y for _, y in smooth)), max(values[-1 - cut], *(y for _, y in smooth)), 4)
    return line_chart(title, lines, unit, "step", y_ticks, nice_ticks(float(x_n[0]), float(x_n[-1])), width=430, height=210)


def _moving_median(x_n: np.ndarray, y_n: np.ndarray, window: int) -> list[tuple[float, float]]:
    """Takes at most MAX_POINTS points, each the median of the `window` points around it (fewer at both ends)."""
    before, stride = window // 2, -(-len(x_n) // MAX_POINTS)
    return [(float(x_n[i]), float(np.median(y_n[max(0, i - before) : i - before + window]))) for i in range(0, len(x_n), stride)]


def _thin(x_n: np.ndarray, y_n: np.ndarray) -> list[tuple[float, float]]:
    """Reduces a curve to at most MAX_POINTS points, each the mean of neighbouring points."""
    size = -(-len(x_n) // MAX_POINTS)
    return [(float(x_n[i : i + size].mean()), float(y_n[i : i + size].mean())) for i in range(0, len(x_n), size)]


def _rollouts(path: Path) -> str:
    damaged, steps, places = DamagedLines(path), array("q"), array("q")
    for line, record in read_records(path, _Rollout, damaged):
        steps.append(record.step)
        places.append(line.begin)
    if not steps:
        if damaged:
            raise UserError(f"{path} holds no rollouts of a training run; line {damaged.numbers[0]}: {damaged.first_reason}")
        return ""
    distinct = sorted(set(steps))
    count = min(SHOWN_STEPS, len(distinct))
    shown: dict[int, list[int]] = {distinct[round(i * (len(distinct) - 1) / max(count - 1, 1))]: [] for i in range(count)}
    for step, place in zip(steps, places):
        if step in shown and len(shown[step]) < SHOWN_ROLLOUTS:
            shown[step].append(place)
    groups, decode = [], Decoder(_Rollout)
    with path.open("rb") as file:
        for step, own in sorted(shown.items()):
            cards = [_card(decode(_line_at(file, place))) for place in own]
            is_open = " open" if step == distinct[-1] else ""
            groups.append(f"<details{is_open}><summary>step {step:,}</summary>{''.join(cards)}</details>")
    total = sum(map(len, shown.values()))
    note = f"{total} of {len(steps):,}, from steps spread over the run. At either end of a text, · is a space and ↵ a line break."
    return f"<p>{note}</p>" + _left_out(damaged) + "".join(groups)


def _line_at(file: BinaryIO, place: int) -> bytes:
    file.seek(place)
    return file.readline()


def _card(record: _Rollout) -> str:
    reward, advantage = ("–" if value is None else f"{value:.3f}" for value in (record.reward, record.advantage))
    facts = (f"token {record.position:,}", f"reward {reward}", f"advantage {advantage}")
    texts = (("prefix", record.prefix_tail), ("sampled", record.rollout), ("true", record.truth))
    spans = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    pairs = "".join(f"<span>{name}</span><pre>{escape(_visible(text))}</pre>" for name, text in texts)
    head = f"<header><b>{escape(record.document)}</b>{spans}</header>"
    return f'<article>{head}<div class="pair">{pairs}</div></article>'


def _visible(text: str) -> str:
    """Makes whitespace at either end visible; a rollout of a few tokens may consist of nothing else."""
    core = text.strip(" \n")
    begin = len(text) - len(text.lstrip(" \n"))
    show = lambda part: part.replace(" ", "·").replace("\n", "↵\n")  # noqa: E731
    return show(text[:begin]) + core + (show(text[begin + len(core) :]))
