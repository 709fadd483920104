"""Shows the progress of an evaluation: samples done, running mean of each task, tokens a second, time left."""

import sys
import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from refine_titan.errors import printable
from refine_titan.report.results import perplexity_of
from refine_titan.terminal import lines_of_parts

# Least time between two lines if there is no terminal to show a bar.
SECONDS_BETWEEN_LINES = 10.0
BAR_COLUMNS = 16


class EvaluationProgress:
    """Shows a live bar on a terminal; without a terminal, writes a line every SECONDS_BETWEEN_LINES."""

    def __init__(self, total: int, total_tokens: int):
        """
        Args:
            total: number of samples, finished ones included.
            total_tokens: prompt tokens of the samples that are not finished.
        """
        self.total, self.total_tokens = total, total_tokens
        self.done, self._read, self._tokens = 0, 0, 0
        self._sums: dict[str, tuple[float, int]] = {}
        self._begin = self._last_line = time.monotonic()
        self.console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self._bar = None
        if self.console.is_terminal:
            columns = (
                TextColumn("evaluating"),
                BarColumn(bar_width=BAR_COLUMNS),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}", markup=False),
            )
            self._bar = Progress(*columns, console=self.console, refresh_per_second=2)
            self._task = self._bar.add_task("evaluating", total=total, status="")
            self._bar.start()

    def resume(self, lines: Iterable[dict[str, Any]]) -> None:
        """Counts samples that were finished before. They count in the means, not in speed and time left."""
        for line in lines:
            self._count(line)

    def add(self, line: dict[str, Any]) -> None:
        """Counts a finished sample by its line of `samples.jsonl`."""
        self._count(line)
        self._read += line["prompt_tokens"]
        self._tokens += line["prompt_tokens"] + line.get("response_tokens", 0)

    def _count(self, line: dict[str, Any]) -> None:
        self.done += 1
        total, count = self._sums.get(line["task"], (0.0, 0))
        self._sums[line["task"]] = total + line.get("score", line.get("nll", 0.0)), count + 1

    def show(self, last: bool = False) -> None:
        """Updates the bar; without a terminal writes a line if enough time has passed or `last` is set."""
        if self._bar is not None:
            room = self.console.width - len(f"evaluating {self.total}/{self.total}") - BAR_COLUMNS - 3
            self._bar.update(self._task, completed=self.done, status=self.status(room))
        elif last or time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.console.print(f"{self.done}/{self.total} samples  {self.status()}", markup=False)

    def status(self, room: int | None = None) -> str:
        """Text with speed, time left and means; as many of these as there is room for, in columns."""
        elapsed = max(time.monotonic() - self._begin, 1e-9)
        # Prompts are far longer than answers, so the time left is proportional to their tokens.
        left = elapsed * (self.total_tokens - self._read) / self._read if self._read else 0.0
        minutes, seconds = divmod(round(left), 60)
        parts = [f"{self._tokens / elapsed:,.0f} tok/s", f"eta {minutes // 60}:{minutes % 60:02}:{seconds:02}"]
        parts += [f"{printable(task)} {self._mean(task):.3f}" for task in self._sums]
        return "  ".join(parts) if room is None else lines_of_parts(parts, room)[0]

    def _mean(self, task: str) -> float:
        """Mean score of a task; the perplexity of documents, whose lines have their loss."""
        total, count = self._sums[task]
        return perplexity_of(total / count) if task == "perplexity" else total / count

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
