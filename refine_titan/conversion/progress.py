"""Shows the progress of conversions, which may take minutes: a bar on a terminal, otherwise a line every half minute."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def progress_bar(title: str, nbytes: int) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of bytes just done. It writes to standard error."""
    columns = TextColumn(title), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    is_terminal, done, last = sys.stderr.isatty(), 0, time.monotonic()
    with Progress(*columns, console=Console(stderr=True), disable=not is_terminal) as progress:
        task = progress.add_task(title, total=nbytes)

        def advance(amount: int) -> None:
            nonlocal done, last
            done, now = done + amount, time.monotonic()
            progress.advance(task, amount)
            if not is_terminal and now - last >= SECONDS_BETWEEN_LINES:
                last = now
                print(f"{title}: {done / 1e9:.1f} of {nbytes / 1e9:.1f} GB", file=sys.stderr, flush=True)

        yield advance
