"""Makes the report's sections about a training run: its curves, and rollouts to read."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from refine_titan.errors import UserError
from refine_titan.monitoring.run_folder import read_json_lines
from refine_titan.report.charts import Line, escape, line_chart, nice_ticks
from refine_titan.report.records import Record

CURVES = (
    ("ntp_loss", "next-token loss", "nats a token"),
    ("reward_mean", "reward", "mean of a step"),
    ("match_mean", "rollout tokens that match", "share"),
    ("answer_loss", "answer loss", "nats a token"),
    ("task_reward", "task reward", "mean of a step"),
    ("grad_norm", "gradient norm", "before clipping"),
)
MAX_POINTS = 300
ROLLOUT_FIELDS = ("step", "document", "position", "prefix_tail", "rollout", "truth", "reward", "advantage")
# Steps whose rollouts are shown, and rollouts shown of each.
SHOWN_STEPS, SHOWN_ROLLOUTS = 6, 4


def training_sections(folder: Path) -> list[tuple[str, str]]:
    """Makes sections (heading, HTML) from a training run's folder.

    Raises:
        UserError: if the folder's metrics are missing or damaged.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder} is no folder of a training run: it has no metrics.jsonl")
    records = read_json_lines(path)
    if not records:
        return [("Training", f"<p>{escape(path)} holds no finished step.</p>")]
    if not isinstance(records[0], dict) or "step" not in records[0]:
        raise UserError(f"{path} holds no steps of a training run; its first line is {str(records[0])[:80]}")
    window = len(records) // 20 if len(records) >= 60 else 1
    intro = f'<p class="path">{escape(folder)}, steps {records[0]["step"]:,} to {records[-1]["step"]:,}</p>'
    if window > 1:
        intro += f"<p>Bold: median over {window} neighbouring steps.</p>"
    charts = "".join(_curve(records, window, *curve) for curve in CURVES)
    return [("Training", f'{intro}<div class="panels">{charts}</div>'), ("Rollouts", _rollouts(folder / "rollouts.jsonl"))]


def _curve(records: Sequence[Record], window: int, name: str, title: str, unit: str) -> str:
    points = [(float(r["step"]), float(r[name])) for r in records if r.get(name) is not None]
    if not points:
        return ""
    smooth, raw = _moving_median(points, window), _thin(points)
    lines = [Line(title, smooth)] + ([Line(title, raw, faint=True)] if window > 1 else [])
    # A spike would flatten the rest of the curve, so the axis spans 98 % of the values and cuts the curve there.
    values = sorted(y for _, y in raw)
    cut = len(values) // 50
    y_ticks = nice_ticks(min(values[cut], *(y for _, y in smooth)), max(values[-1 - cut], *(y for _, y in smooth)), 4)
    return line_chart(title, lines, unit, "step", y_ticks, nice_ticks(points[0][0], points[-1][0]), width=430, height=210)


def _moving_median(points: list[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Takes at most MAX_POINTS points, each the median of the `window` points around it (fewer at both ends)."""
    before, stride = window // 2, -(-len(points) // MAX_POINTS)
    return [(points[i][0], median(y for _, y in points[max(0, i - before) : i - before + window])) for i in range(0, len(points), stride)]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Reduces a curve to at most MAX_POINTS points, each the mean of neighbouring points."""
    size = -(-len(points) // MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _rollouts(path: Path) -> str:
    records = read_json_lines(path)
    for record in records[:1]:
        missing = [name for name in ROLLOUT_FIELDS if name not in record]
        if missing:
            raise UserError(f"{path} holds no rollouts of a training run: its first line lacks {', '.join(missing)}")
    steps = sorted({record["step"] for record in records})
    if not steps:
        return ""
    count = min(SHOWN_STEPS, len(steps))
    shown = {steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)}
    groups, total = [], 0
    for step in sorted(shown):
        cards = [_card(record) for record in records if record["step"] == step][:SHOWN_ROLLOUTS]
        total += len(cards)
        is_open = " open" if step == steps[-1] else ""
        groups.append(f"<details{is_open}><summary>step {step:,}</summary>{''.join(cards)}</details>")
    note = f"{total} of {len(records):,}, from steps spread over the run. At either end of a text, · is a space and ↵ a line break."
    return f"<p>{note}</p>" + "".join(groups)


def _card(record: Record) -> str:
    # A value that was not finite is null in the file.
    reward, advantage = ("–" if record[name] is None else f"{record[name]:.3f}" for name in ("reward", "advantage"))
    facts = (f"token {record['position']:,}", f"reward {reward}", f"advantage {advantage}")
    texts = (("prefix", "prefix_tail"), ("sampled", "rollout"), ("true", "truth"))
    spans = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    pairs = "".join(f"<span>{name}</span><pre>{escape(_visible(record[field]))}</pre>" for name, field in texts)
    head = f"<header><b>{escape(record['document'])}</b>{spans}</header>"
    return f'<article>{head}<div class="pair">{pairs}</div></article>'


def _visible(text: str) -> str:
    """Makes whitespace at either end visible; a rollout of a few tokens may consist of nothing else."""
    core = text.strip(" \n")
    begin = len(text) - len(text.lstrip(" \n"))
    show = lambda part: part.replace(" ", "·").replace("\n", "↵\n")  # noqa: E731
    return show(text[:begin]) + core + (show(text[begin + len(core) :]))
