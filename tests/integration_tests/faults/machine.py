"""A machine whose disk, locks and power fail as a test says: `failing_calls.c` preloaded into `warm.py`."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration_tests.runs import REPOSITORY

SOURCE = Path(__file__).with_name("failing_calls.c")


@dataclass(frozen=True)
class Fault:
    """Which system calls on which files fail, and how.

    Attributes:
        calls: names joined by '+', as in failing_calls.c.
        action: an errno's name, "kill" or "term".
        files: a pattern of the absolute paths; {folder} is the folder of the run. With ENOSPC for all calls, the first of them finds
            the disk of that folder full, which it then is for every file.
        skip: how many such calls succeed first.
        count: how many fail then; 0 for all.
    """

    calls: str
    action: str
    files: str
    skip: int = 0
    count: int = 0

    def rule(self, folder: Path, marker: Path) -> str:
        action = self.action if self.action in ("kill", "term") else getattr(errno, self.action)
        return f"{self.calls}:{action}:{self.skip}:{self.count}:{self.files.format(folder=folder)}:{folder}*:{marker}"


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit status (negative for a signal), and what it printed."""

    status: int
    output: str
    errors: str

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.errors.splitlines() if line.startswith("error")]


class Machine:
    """Runs commands one after the other, each with or without a fault."""

    def __init__(self, folder: Path):
        self.folder = folder
        library = folder / "failing_calls.so"
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            pytest.skip("no C compiler makes the library that lets system calls fail")
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl", "-lpthread"], check=True)
        ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        environment |= {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "NGPU": "1", "PYTHONWARNINGS": "ignore::DeprecationWarning"}
        command = [sys.executable, "-m", "tests.integration_tests.faults.warm"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdin=pipe, stdout=pipe, text=True)
        self._number = 0

    def run(self, *arguments, fault: Fault | None = None, folder: Path | None = None, timeout: float = 120) -> Outcome:
        """Runs a command of the product to its end: `-m MODULE ...` or `FILE ...`.

        With a fault, at least one call must have met it, or the test fails: a fault that never comes shows nothing.
        """
        self._number += 1
        base = self.folder / f"{self._number:03}"
        marker, output, error = (base.with_suffix(suffix) for suffix in (".met", ".out", ".err"))
        environment = {"FAILING_CALLS": fault.rule(folder, marker) if fault is not None else ""}
        request = {"arguments": list(map(str, arguments)), "environment": environment, "timeout": timeout}
        self._process.stdin.write(json.dumps(request | {"output": str(output), "error": str(error)}) + "\n")
        self._process.stdin.flush()
        status = json.loads(self._process.stdout.readline())
        outcome = Outcome(status, output.read_text(errors="replace"), error.read_text(errors="replace"))
        assert status is not None, f"still running after {timeout} s:\n{outcome.output[-2000:]}{outcome.errors[-2000:]}"
        if fault is not None:
            assert marker.exists(), f"no call met {fault}:\n{outcome.output[-2000:]}{outcome.errors[-2000:]}"
        return outcome

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
