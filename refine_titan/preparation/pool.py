"""A pool of worker processes. They are spawned, so that they inherit no state, and they end when the parent ends, however it ends."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from refine_titan.errors import UserError

SECONDS_TO_END = 5.0


class WorkerDied(Exception):
    """A worker process ended unexpectedly, by a signal for example."""


class Pool:
    """Runs module-level functions in up to `workers` processes; with one worker, in this process.

    Use it as a context manager: leaving the block ends the processes at once, even in the middle of a task.
    """

    def __init__(self, workers: int):
        self.workers = workers
        self._processes: list[tuple[multiprocessing.Process, Connection]] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
        for process, _ in self._processes:
            process.terminate()
        for process, connection in self._processes:
            process.join(SECONDS_TO_END)
            if process.is_alive():
                process.kill()
                process.join()
            connection.close()
        self._processes = []

    def run(self, function: Callable, tasks: Iterable[tuple]) -> Iterator[tuple[int, Any]]:
        """Runs `function(*task)` for every task; yields the task's number and the result as tasks finish. Tasks start in order.

        Raises:
            UserError, OSError: the function raised it.
            WorkerDied: a worker process ended unexpectedly.
            RuntimeError: the function raised another exception in a worker.
        """
        queue = list(enumerate(tasks))
        if self.workers == 1:
            for number, task in queue:
                yield number, function(*task)
            return
        self._start(min(self.workers, len(queue)))
        queue.reverse()
        idle, busy = list(self._processes), {}
        while queue or busy:
            while queue and idle:
                process, connection = idle.pop()
                number, task = queue.pop()
                try:
                    connection.send((function, task))
                except BrokenPipeError:
                    raise self._died(process, function) from None
                busy[connection] = (process, number)
            for connection in wait(list(busy)):
                process, number = busy.pop(connection)
                yield number, self._result(process, connection, function)
                idle.append((process, connection))

    def _start(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        # Ctrl-C reaches every process of the group. Workers inherit a mask that blocks it, because the parent ends them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            while len(self._processes) < count:
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                self._processes.append((process, ours))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _result(self, process: multiprocessing.Process, connection: Connection, function: Callable) -> Any:
        try:
            kind, value = connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._died(process, function) from None
        if kind == "result":
            return value
        if kind == "error":
            raise value
        raise RuntimeError(f"a worker process failed during {function.__name__}:\n{value}")

    def _died(self, process: multiprocessing.Process, function: Callable) -> WorkerDied:
        process.join(SECONDS_TO_END)
        code = process.exitcode
        how = f"by signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"with status {code}"
        hint = "; memory may have run out: use fewer --workers" if code == -signal.SIGKILL else ""
        return WorkerDied(f"a worker process ended {how} during {function.__name__}{hint}")


def _work(connection: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            function, task = connection.recv()
        except EOFError:  # the parent is gone
            return
        try:
            answer = "result", function(*task)
        except UserError as error:
            answer = "error", UserError(str(error))
        except OSError as error:
            answer = "error", OSError(error.errno, error.strerror or str(error), error.filename)
        except BaseException:  # the parent has to report it, whatever it is
            answer = "failure", traceback.format_exc()
        connection.send(answer)


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
