"""Runs the parts of an acceptance: commands with a time limit, the checks of what they print, and a report that is whole at any moment."""

import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from refine_titan.files.whole_files import write_atomically

PASSED, FAILED, OVER_LIMIT, LEFT_OUT, NOT_BEGUN, NOT_ENDED = "passed", "failed", "over its limit", "left out", "not begun", "not ended"
# Bytes of a failed command's output that the report shows.
SHOWN_OUTPUT = 600


@dataclass
class Check:
    """A comparison.

    Attributes:
        name: what is compared.
        found: the value found.
        allowed: the values allowed, in words.
        ok: whether it is allowed; None if it was not checked, because the device computes no values.
    """

    name: str
    found: Any
    allowed: str
    ok: bool | None


@dataclass
class Finished:
    """A command that has ended: its exit status, what it printed, and the folder that it wrote to."""

    status: int
    output: str
    folder: Path


@dataclass
class Command:
    """A process of a part.

    Attributes:
        name: in the report.
        arguments: program and arguments.
        read: takes the finished command; returns figures for the report, and checks.
        statuses: exit statuses after which `read` can be called.
    """

    name: str
    arguments: list[str]
    read: Callable[[Finished], tuple[dict[str, Any], list[Check]]]
    statuses: tuple[int, ...] = (0,)


@dataclass
class Part:
    """Commands under one time limit.

    Attributes:
        name: on the command line.
        subject: what the part shows.
        limit: most seconds for all commands.
        commands: what runs.
        at_once: commands that run at the same time; 1 where time is measured.
        left_out: why the part does not run here; empty if it runs.
    """

    name: str
    subject: str
    limit: float
    commands: list[Command]
    at_once: int = 1
    left_out: str = ""


@dataclass
class Result:
    """What became of a part; `seconds` and `limit` in seconds, `figures` by command."""

    status: str = NOT_BEGUN
    seconds: float = 0.0
    limit: float = 0.0
    reason: str = ""
    commands: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)


class Report:
    """`report.json` and `report.md` of a folder, written again whenever a part begins or ends."""

    def __init__(self, folder: Path, header: dict[str, Any], parts: list[Part]):
        self.folder, self.header = folder, header
        self.results = {part.name: Result() for part in parts}
        self.subjects = {part.name: part.subject for part in parts}
        self.write()

    def begin(self, name: str) -> None:
        self.set(name, Result(NOT_ENDED))

    def set(self, name: str, result: Result) -> None:
        self.results[name] = result
        self.write()

    @property
    def has_failed(self) -> bool:
        return any(result.status in (FAILED, OVER_LIMIT) for result in self.results.values())

    def write(self) -> None:
        document = self.header | {"parts": {name: asdict(result) for name, result in self.results.items()}}
        write_atomically(self.folder / "report.json", json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")
        write_atomically(self.folder / "report.md", self.markdown())

    def markdown(self) -> str:
        lines = [f"- {name}: {value if isinstance(value, str) else json.dumps(value)}" for name, value in self.header.items()]
        lines += ["", "| part | shows | status | seconds (limit) | figures |", "|---|---|---|---|---|"]
        for name, result in self.results.items():
            cells = [f"{command}: {_short(figures)}" for command, figures in result.figures.items()]
            unchecked = sum(check.ok is None for check in result.checks)
            notes = [result.reason, f"{unchecked} values not checked" if unchecked else ""]
            status = "; ".join([result.status, *filter(None, notes)]).replace("|", "\\|").replace("\n", " ")
            lines.append(
                f"| {name} | {self.subjects[name]} | {status} | {result.seconds:.0f} ({result.limit:.0f}) | {'<br>'.join(cells) or '-'} |"
            )
        return "\n".join(lines) + "\n"


def run_part(part: Part, seconds_left: float, folder: Path, environment: dict[str, str]) -> Result:
    """Runs a part to its end, or kills it at its limit, which is at most `seconds_left`.

    Args:
        folder: gets a folder for each command, with its output.
    """
    result = Result(limit=min(part.limit, seconds_left), commands=[" ".join(command.arguments) for command in part.commands])
    if part.left_out:
        result.status, result.reason = LEFT_OUT, part.left_out
        return result
    if seconds_left <= 0:
        result.status, result.reason = LEFT_OUT, "no time was left"
        return result
    begin, waiting, running = time.monotonic(), list(part.commands), {}
    broken = []
    try:
        while waiting or running:
            while waiting and len(running) < part.at_once:
                command = waiting.pop(0)
                running[command.name] = (command, _start(command, folder / part.name / command.name, environment))
            for name, (command, process) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    broken += _read(command, process.returncode, folder / part.name / name, result)
            if running and time.monotonic() - begin > result.limit:
                names = [*running, *(command.name for command in waiting)]
                result.status, result.reason = OVER_LIMIT, f"not finished: {', '.join(names)}"
                break
            time.sleep(0.05)
    finally:
        for _, process in running.values():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        result.seconds = round(time.monotonic() - begin, 1)
    broken += [f"{check.name} is {check.found}; allowed: {check.allowed}" for check in result.checks if check.ok is False]
    result.reason = "; ".join([*filter(None, [result.reason]), *broken])
    if result.status != OVER_LIMIT:
        result.status = FAILED if broken else PASSED
    return result


def _start(command: Command, folder: Path, environment: dict[str, str]) -> subprocess.Popen:
    """Starts a command in a process group of its own, so that it can be killed with whatever it starts."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("wb") as output, (folder / "errors.txt").open("wb") as errors:
        return subprocess.Popen(command.arguments, stdout=output, stderr=errors, env=environment, start_new_session=True)


def _read(command: Command, status: int, folder: Path, result: Result) -> list[str]:
    """Adds figures and checks of a finished command to the part's result; returns what is wrong if there are none."""
    finished = Finished(status, (folder / "output.txt").read_text(errors="replace"), folder)
    if status in command.statuses:
        try:
            figures, checks = command.read(finished)
        except (ValueError, KeyError, OSError) as error:
            return [f"{command.name}: its output cannot be read ({type(error).__name__}: {error})"]
        result.figures[command.name] = figures
        result.checks += checks
        return []
    shown = ((folder / "errors.txt").read_text(errors="replace").strip() or finished.output.strip())[-SHOWN_OUTPUT:]
    return [f"{command.name}: exit status {status}: {shown}"]


def _finite(value: Any) -> Any:
    """The same without numbers that JSON cannot express, which become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def _short(figures: dict[str, Any]) -> str:
    numbers = {name: f"{value:,.4g}" if isinstance(value, float) else value for name, value in figures.items()}
    return ", ".join(f"{name} {value}" for name, value in numbers.items() if not isinstance(value, (dict, list)))
