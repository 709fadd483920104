"""Runs commands of the product in forks of one process that has imported everything, because importing takes longer than a small run.

    LD_PRELOAD=failing_calls.so python -m tests.integration_tests.faults.warm < requests > statuses

A fork runs the command's file as `__main__`, so everything but the interpreter's start is as in a process of its own. The ranks of
`refine_titan.launch` are forks of the launcher. Processes that the product starts itself (workers) are new interpreters.
"""

import ctypes
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import refine_titan  # noqa: F401  # isort: skip  announces the device before torchtitan is imported
import torchtitan.train
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

REPOSITORY = Path(__file__).parents[3]


def run_as_main(arguments: list[str]) -> int:
    """Runs `-m MODULE ...` or `FILE ...` as the interpreter would; returns the exit status."""
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return status


class Fork:
    """A child process, with what torchelastic asks a `Popen` for."""

    def __init__(self, arguments: list[str], environment: dict[str, str], output: str | None = None, error: str | None = None):
        sys.stdout.flush()
        self.args = arguments
        self.pid = os.fork()
        self.returncode: int | None = None
        if self.pid == 0:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            for path, descriptor in ((output, 1), (error, 2)):
                if path is not None:
                    os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), descriptor)
            os.environ.clear()
            os.environ.update(environment)
            library = ctypes.CDLL(environment["LD_PRELOAD"])
            library.set_failing_calls(environment.get("FAILING_CALLS", "").encode())
            os._exit(run_as_main(arguments))

    def poll(self) -> int | None:
        self._collect(os.WNOHANG)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if timeout is not None:
            deadline = time.monotonic() + timeout
            while self.poll() is None:
                if time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired(self.args, timeout)
                time.sleep(0.01)
        self._collect(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _collect(self, options: int) -> None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)


def fork_rank(self: SubprocessHandler, command: tuple[str, ...], environment: dict[str, str]) -> Fork:
    """Stands in for the handler's `_popen`, whose command is an interpreter, `-u` and the arguments of a rank."""
    arguments = [argument for argument in command[1:] if argument != "-u"]
    return Fork(arguments, environment)


def import_everything() -> None:

    import refine_titan.evaluation.job  # noqa: F401
    import refine_titan.launch  # noqa: F401
    import refine_titan.preparation.run  # noqa: F401
    import refine_titan.report.evaluation_report  # noqa: F401
    import refine_titan.train  # noqa: F401

    del sys.modules["refine_titan.train"], sys.modules["refine_titan.launch"]  # runpy warns of a module that is there already


def main() -> None:
    import_everything()
    SubprocessHandler._popen = fork_rank
    # After the last checkpoint it sleeps for two seconds.
    torchtitan.train.time = SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda _: None)
    os.chdir(REPOSITORY)
    for line in sys.stdin:
        request = json.loads(line)
        environment = os.environ | request["environment"]
        fork = Fork(request["arguments"], environment, request["output"], request["error"])
        try:
            status = fork.wait(request["timeout"])
        except subprocess.TimeoutExpired:
            os.killpg(fork.pid, signal.SIGABRT)
            status = None
        print(json.dumps(status), flush=True)


if __name__ == "__main__":
    main()
