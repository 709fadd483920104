"""Shows the progress of training: a line per logged step, and on a terminal a bar below it."""

import logging
import sys
import time
from collections import deque
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class ProgressDisplay:
    """Prints a line per logged step; on a terminal it also shows a live bar with the time left."""

    def __init__(self, total_steps: int, done_steps: int, logger: logging.Logger):
        self.total_steps = total_steps
        self.console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self._recent = deque([time.monotonic()], maxlen=21)
        self._bar = None
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}", markup=False),
                console=self.console,
                refresh_per_second=2,
            )
            self._task = self._bar.add_task("training", total=total_steps, completed=done_steps, status="")
            self._bar.start()
            # Log lines must go through the same console, or they would overwrite the bar.
            logger.handlers[:] = [RichHandler(console=self.console, show_path=False)]

    def update(self, step: int, metrics: dict[str, Any], print_line: bool) -> None:
        """Shows a finished step."""
        self._recent.append(time.monotonic())
        eta = self._eta(step)
        if print_line:
            self.console.print(format_line(step, self.total_steps, metrics, eta), markup=False)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=f"loss {metrics['loss']:.4f}  eta {eta}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _eta(self, step: int) -> str:
        per_step = (self._recent[-1] - self._recent[0]) / max(len(self._recent) - 1, 1)
        minutes, seconds = divmod(round((self.total_steps - step) * per_step), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


def format_line(step: int, total_steps: int, m: dict[str, Any], eta: str) -> str:
    """The line of one step: its losses, rewards and gradient norm, tokens per second, seconds per stage, time left."""
    parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
    parts.append(f"loss {m['loss']:.4f}")
    if m["ntp_loss"] is not None:
        parts.append(f"ntp {m['ntp_loss']:.4f}")
    if m["pg_loss"] is not None:
        parts += [
            f"pg {m['pg_loss']:+.4f}",
            f"reward {m['reward_mean']:.3f}±{m['reward_std']:.3f}",
            f"adv ±{m['advantage_std']:.2f}",
            f"match {m['match_mean']:.3f}",
            f"clip {m['clip_fraction']:.2f}",
        ]
    if m.get("answer_loss") is not None:
        parts.append(f"answer {m['answer_loss']:.4f}")
    if m.get("task_reward") is not None:
        parts.append(f"task reward {m['task_reward']:.3f}±{m['task_reward_std']:.3f}")
    norm = "non-finite, skipped" if m["grad_norm"] is None else f"{m['grad_norm']:.3f}"
    stages = " ".join(f"{name} {seconds:.2f}" for name, seconds in m["seconds"].items() if name != "total")
    parts += [f"grad {norm}", f"{m['tokens_per_second']:,.0f} tok/s", f"[{stages} s]", f"eta {eta}"]
    return "  ".join(parts)
