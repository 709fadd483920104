"""The line of a training step."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from refine_titan.monitoring.metric_names import LOSS, TIMING, TOKENS_PER_SECOND, is_stage
from refine_titan.terminal import MOST_COLUMNS, lines_of_parts


class StepLine:
    """The line of a step, at most `MOST_COLUMNS` wide. The columns that matter least are left out where they do not fit.

    A column keeps the room of the widest value that it has had, so that the lines of a run have the same columns.
    """

    def __init__(self, total_steps: int, log_stages: bool = False):
        self.total_steps, self.log_stages = total_steps, log_stages
        self._room: dict[str, int] = {}

    def text(self, step: int, metrics: Mapping[str, Any], eta: str, width: int = MOST_COLUMNS) -> str:
        """Losses, rewards, gradient norm, tokens per second and time left; with `log_stages`, the seconds of each stage below."""
        width = min(width, MOST_COLUMNS)
        columns = [column for column in self._columns(step, metrics, eta) if column.text]
        for column in columns:
            self._room[column.name] = max(self._room.get(column.name, 0), len(column.text) + len(column.gap))
        kept = set()
        for column in sorted(columns, key=lambda column: column.rank):
            if column.rank > 0 and sum(self._room[name] for name in kept) + self._room[column.name] > width:
                continue
            kept.add(column.name)
        line = "".join(column.gap + column.text for column in columns if column.name in kept)
        return "\n".join([line, *(self._stages(metrics, width) if self.log_stages else [])])

    def _columns(self, step: int, metrics: Mapping[str, Any], eta: str) -> list["Column"]:
        m = metrics.get
        norm = "grad non-finite" if m("grad_norm") is None else fixed("grad", m("grad_norm"), 3)
        return [
            Column("step", f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}", 0, gap=""),
            Column("loss", fixed("loss", m(LOSS), 4), 0),
            Column("answer", fixed("answer", m("refine/answer_loss"), 4), 1),
            Column("task", fixed("task reward", m("rollout/task_reward"), 3), 1),
            Column("task std", fixed("±", m("rollout/task_reward_std"), 3), 5, gap=""),
            Column("reward", fixed("reward", m("rollout/reward_mean"), 3), 2),
            Column("reward std", fixed("±", m("rollout/reward_std"), 3), 4, gap=""),
            Column("match", fixed("match", m("rollout/match_mean"), 3), 3),
            Column("grad", norm, 0),
            Column("tok/s", f"{m(TOKENS_PER_SECOND):,.0f} tok/s", 0),
            Column("eta", f"eta {eta}", 0),
        ]

    @staticmethod
    def _stages(metrics: Mapping[str, Any], width: int) -> list[str]:
        stages = [f"{name.removeprefix(TIMING)} {metrics[name]:.2f}" for name in metrics if is_stage(name)]
        return [f"    {line}" for line in lines_of_parts(["seconds:", *stages], width - 4)]


class Column(NamedTuple):
    """A part of the line. Rank 0 always stands there; those of the highest ranks are left out first."""

    name: str
    text: str
    rank: int
    gap: str = "  "


def fixed(label: str, value: float | None, digits: int) -> str:
    """`label value`; nothing if there is no value, and never -0."""
    return "" if value is None else f"{label}{'' if label == '±' else ' '}{round(value, digits) + 0.0:.{digits}f}"
