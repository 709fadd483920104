"""Shows a progress bar on a terminal, for conversions that take minutes."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(title: str, nbytes: int) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of bytes just done. Shows nothing if standard error is not a terminal."""
    columns = TextColumn(title), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(title, total=nbytes)
        yield lambda done: progress.advance(task, done)
