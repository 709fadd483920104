"""Shows the progress of the preparation: a bar on a terminal, otherwise a line every half minute."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def progress_display(title: str, size: int, done: int) -> Iterator[Callable[[int, int], None]]:
    """Yields a function `advance(amount, tokens)`, to be called with the part of `size` that was just done and its number of tokens.

    Each call updates the share that is done and the tokens per second, on standard error: a bar on a terminal, otherwise a line every
    half minute. `done` is the part of `size` that an earlier call did.
    """
    is_terminal = sys.stderr.isatty()
    begin = last = time.monotonic()
    tokens = 0
    texts = TextColumn("{task.description:<14}"), TextColumn("{task.fields[rate]}")
    columns = texts[0], BarColumn(), TaskProgressColumn(), texts[1], TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not is_terminal) as display:
        task = display.add_task(title, total=max(size, 1), completed=done, rate="")

        def advance(amount: int, new_tokens: int) -> None:
            nonlocal done, tokens, last
            done, tokens, now = done + amount, tokens + new_tokens, time.monotonic()
            rate = f"{tokens / (now - begin):,.0f} tokens/s" if tokens and now > begin else ""
            display.update(task, completed=done, rate=rate)
            if not is_terminal and now - last >= SECONDS_BETWEEN_LINES:
                last = now
                print(f"{title}: {done / max(size, 1):.1%}  {rate}".rstrip(), file=sys.stderr, flush=True)

        yield advance
