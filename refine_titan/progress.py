"""Shows how far a long piece of work is: a bar on a terminal, elsewhere a line now and then."""

import sys
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from refine_titan.errors import printable

# Least time between two lines where there is no terminal to show a bar.
SECONDS_BETWEEN_LINES = 30.0
BAR_COLUMNS = 16
# The time left follows from the last updates: so many of them, or those of so many seconds where these are more.
RECENT_UPDATES, RECENT_SECONDS = 20, 30.0


class Progress:
    """Shows what is done of a total, tokens per second, the time left, and whatever else the caller knows.

    It is closed at the end of its context, or by `close`.
    """

    def __init__(
        self,
        title: str,
        total: int,
        unit: Literal["bytes", "share", "steps", "samples"],
        *,
        done: int = 0,
        work: float | None = None,
        stream: TextIO | None = None,
        seconds_between_lines: float | None = SECONDS_BETWEEN_LINES,
    ):
        """
        Args:
            title: what is done; spaces at its end align several bars below each other.
            unit: of `total`; as a share, done and total are not shown themselves.
            done: the part of `total` that was done before. It counts in no rate.
            work: all that is left to do, if the time is not proportional to `total - done`.
            stream: None for standard error.
            seconds_between_lines: where there is no terminal; None for no lines.
        """
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self._work_left = total - done if work is None else work
        self._tokens, self._others = 0, ()
        self._begin = self._last_line = now = time.monotonic()
        self._recent = deque([(now, self._work_left)])
        self._between = seconds_between_lines
        self.console = Console(file=stream or sys.stderr, soft_wrap=True, highlight=False)
        self._bar = None
        if self.console.is_terminal:
            columns = TextColumn("{task.description}", markup=False), BarColumn(bar_width=BAR_COLUMNS)
            texts = TextColumn("{task.fields[amount]}"), TextColumn("{task.fields[status]}", markup=False)
            self._bar = RichProgress(*columns, *texts, console=self.console, refresh_per_second=2)
            self._task = self._bar.add_task(title, total=max(total, 1), completed=done, amount=self._amount(), status="")
            self._bar.start()  # from here on, what is written to the terminal stands above the bar

    def advance(self, amount: int = 1, *, tokens: int = 0, work: float | None = None, others: Sequence[str] = ()) -> None:
        """Counts what was just done and shows it.

        Args:
            amount: of the total.
            tokens: to be counted in tokens per second.
            work: of the work that was left; by default `amount`.
            others: texts to show beside it, the most important first: a terminal shows as many as it has room for.
        """
        self.done += amount
        self._tokens += tokens
        self._work_left -= amount if work is None else work
        self._others = tuple(map(printable, others))
        now = time.monotonic()
        self._recent.append((now, self._work_left))
        while len(self._recent) > RECENT_UPDATES + 1 and now - self._recent[1][0] >= RECENT_SECONDS:
            self._recent.popleft()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, amount=self._amount(), status=self._status())
        elif self._between is not None and now - self._last_line >= self._between:
            self.write_line()

    def write_line(self) -> None:
        """Writes a line at once where there is no terminal."""
        if self._bar is None and self._between is not None:
            self._last_line = time.monotonic()
            self.print("  ".join([f"{self.title.rstrip()}: {self._amount()}", *self._parts()]))

    def print(self, text: str) -> None:
        """Writes lines; on a terminal they stand above the bar."""
        self.console.print(text, markup=False)

    @property
    def time_left(self) -> str:
        """`1:27` or `2:01:27`; empty as long as it is not known."""
        (before, more), (now, left) = self._recent[0], self._recent[-1]
        return duration((now - before) * left / (more - left)) if more > left else ""

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _amount(self) -> str:
        if self.unit == "share":
            return f"{self.done / max(self.total, 1):.1%}"
        if self.unit == "bytes":
            size, name = (1e9, "GB") if self.total >= 1e9 else (1e6, "MB")
            return f"{self.done / size:.1f} of {self.total / size:.1f} {name}"
        return f"{self.done}/{self.total}" if self._bar is not None else f"{self.done}/{self.total} {self.unit}"

    def _parts(self) -> list[str]:
        seconds, left = self._recent[-1][0] - self._begin, self.time_left
        rate = f"{self._tokens / seconds:,.0f} tok/s" if self._tokens and seconds > 0 else ""
        return [part for part in (rate, left and f"eta {left}", *self._others) if part]

    def _status(self) -> str:
        """As many of the parts as there is room for, in columns, beside the others of the bar."""
        room = self.console.width - len(f"{self.title}  {self._amount()} ") - BAR_COLUMNS
        parts = self._parts()
        while len("  ".join(parts)) > room:
            parts.pop()
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """`1:27` for 87 seconds, `2:01:27` for hours."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
