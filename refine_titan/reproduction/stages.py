"""Runs the stages of an experiment as processes, several at once. A stage begins when the stages that it needs are done."""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from refine_titan.errors import UserError

POLL_SECONDS = 0.2
# Time between two reports about the running stages.
STATUS_SECONDS = 60.0
# A stopped training run first writes a checkpoint. A process that needs longer to stop is killed,
# and later resumes from an earlier checkpoint.
STOP_SECONDS = 60.0
LINES_OF_A_FAILURE = 15


@dataclass(frozen=True)
class Stage:
    """One process of an experiment.

    Attributes:
        name: the stage's name; its log is NAME.log in the log folder.
        command: the process's command, which must resume after an interruption.
        is_done: tells whether the stage's result exists.
        needs: names of the stages that must be done before.
        prepare: writes what the process reads.
        folder: where its result is.
    """

    name: str
    command: tuple[str, ...]
    is_done: Callable[[], bool]
    needs: tuple[str, ...] = ()
    prepare: Callable[[], None] = lambda: None
    folder: Path = Path()


class StageFailed(UserError):
    """A stage's process ended with an error, or without the stage's result."""


def run_stages(
    stages: Sequence[Stage], num_jobs: int, logs: Path, directory: Path, environment: dict[str, str], report: Callable[[str], None] = print
) -> None:
    """Runs every stage that is not done, in the given order as far as `needs` allows.

    Args:
        num_jobs: most processes at once.
        logs: folder of the logs; NAME.log holds the commands and the output of a stage's processes.
        directory: working directory of the processes.
        environment: environment variables of the processes.
        report: gets a line when a stage begins and ends, and every STATUS_SECONDS the last line of each running stage.

    Raises:
        StageFailed: if a stage fails, after `report` has got the end of its log. The other processes are stopped.
    """
    done = {stage.name for stage in stages if stage.is_done()}
    waiting = [stage for stage in stages if stage.name not in done]
    total, running = len(stages), {}
    if done:
        report(f"{len(done)} of {total} stages are done already")
    last_status = time.monotonic()
    try:
        while waiting or running:
            for stage in [stage for stage in waiting if done.issuperset(stage.needs)][: num_jobs - len(running)]:
                waiting.remove(stage)
                running[stage.name] = _RunningStage(stage, logs, directory, environment)
                report(f"{stage.name}: begins; its log is {running[stage.name].log}")
            time.sleep(POLL_SECONDS)
            for process in [process for process in running.values() if process.ended()]:
                del running[process.stage.name]
                process.check(report)
                done.add(process.stage.name)
                report(f"[{len(done)}/{total}] {process.stage.name}: done in {process.seconds:.0f} s")
            if time.monotonic() - last_status > STATUS_SECONDS:
                last_status = time.monotonic()
                for process in running.values():
                    report(f"  {process.stage.name}: {process.last_line():.120}")
    finally:
        _stop(list(running.values()))


class _RunningStage:
    """A stage's process and its log."""

    def __init__(self, stage: Stage, logs: Path, directory: Path, environment: dict[str, str]):
        self.stage, self.log = stage, logs / f"{stage.name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        stage.prepare()
        self.begin = time.monotonic()
        with self.log.open("ab") as file:
            file.write(f"$ {shlex.join(stage.command)}\n".encode())
            file.flush()
            # In a session of its own the process gets no Ctrl-C; this program gets it and stops its stages.
            self.process = subprocess.Popen(
                stage.command,
                cwd=directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def ended(self) -> bool:
        return self.process.poll() is not None

    def check(self, report: Callable[[str], None]) -> None:
        if self.process.returncode != 0:
            what = f"ended with status {self.process.returncode}"
        elif not self.stage.is_done():
            what = "ended without its result"
        else:
            return
        for line in self._lines()[-LINES_OF_A_FAILURE:]:
            report(f"  {line}")
        raise StageFailed(f"stage {self.stage.name} {what}: {self.last_line()} (its log is {self.log})")

    def last_line(self) -> str:
        return next((line for line in reversed(self._lines()) if line.strip()), "starting")

    def _lines(self) -> list[str]:
        with self.log.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 16384, 0))
            return file.read().decode("utf-8", errors="replace").splitlines()


def _stop(running: Sequence[_RunningStage]) -> None:
    for process in running:
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    for process in running:
        try:
            process.process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGKILL)
            process.process.wait()


def _signal(process: _RunningStage, number: int) -> None:
    try:
        os.killpg(process.process.pid, number)
    except ProcessLookupError:
        pass
