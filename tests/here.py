"""Runs commands in the process of the tests, where a process of their own would take seconds to import torch.

For commands that are refused, and for others that no signal ends. Afterwards the process is as it was before.
"""

import gc
import io
import logging
import os
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from tests.integration_tests.runs import TINY

OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_here(work: Callable[[], int], *arguments) -> subprocess.CompletedProcess:
    """What a process that does this work would end with and print."""
    output, errors = io.StringIO(), io.StringIO()
    with _unchanged_process(), redirect_stdout(output), redirect_stderr(errors):
        try:
            status = work()
        except SystemExit as end:
            status = end.code or 0
    return subprocess.CompletedProcess(arguments, status, output.getvalue(), errors.getvalue())


def command_here(*arguments) -> subprocess.CompletedProcess:
    """`refine-titan ARGUMENTS`."""
    from refine_titan.commands.main import main

    return run_here(lambda: main([*map(str, arguments)]), *arguments)


def train_here(folder: Path, *overrides: str, config: Path = TINY) -> subprocess.CompletedProcess:
    """`train` of `integration_tests/runs.py`, for runs that are refused before they train."""
    from refine_titan.train import main

    arguments = ["--job.config_file", str(config), "--job.dump_folder", str(folder), *overrides]
    return run_here(lambda: main(arguments), *arguments)


@contextmanager
def _unchanged_process() -> Iterator[None]:
    """Takes back what a command changes: the environment, the log, warnings, signals, and garbage collection, which torchtitan's trainer
    switches off."""
    environment, root = dict(os.environ), logging.getLogger()
    handlers, level, show = root.handlers[:], root.level, warnings.showwarning
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    for name in OF_A_LAUNCHER:
        os.environ.pop(name, None)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        warnings.showwarning = show
        os.environ.clear()
        os.environ.update(environment)
        root.handlers[:] = handlers
        root.setLevel(level)
        for number, handler in signals.items():
            signal.signal(number, handler)
        gc.enable()
