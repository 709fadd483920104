"""A pool of worker processes."""

from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import wait
from typing import Any

from refine_titan.worker_process import WorkerProcess


class Pool:
    """Runs module-level functions in up to `workers` processes; with one worker, in this process.

    Use it as a context manager: leaving the block ends the processes at once, even in the middle of a task.
    """

    def __init__(self, workers: int):
        self.num_workers = workers
        self._workers: list[WorkerProcess] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
        for worker in self._workers:
            worker.end()
        self._workers = []

    def run(self, function: Callable, tasks: Iterable[tuple]) -> Iterator[tuple[int, Any]]:
        """Runs `function(*task)` for every task; yields the task's number and the result as tasks finish. Tasks start in order.

        Raises:
            UserError, OSError: the function raised it.
            WorkerDied: a worker process ended unexpectedly.
            RuntimeError: the function raised another exception in a worker.
        """
        queue = list(enumerate(tasks))
        if self.num_workers == 1:
            for number, task in queue:
                yield number, function(*task)
            return
        while len(self._workers) < min(self.num_workers, len(queue)):
            self._workers.append(WorkerProcess())
        queue.reverse()
        idle, busy = list(self._workers), {}
        while queue or busy:
            while queue and idle:
                worker = idle.pop()
                number, task = queue.pop()
                worker.send(function, *task)
                busy[worker.connection] = (worker, number)
            for connection in wait(list(busy)):
                worker, number = busy.pop(connection)
                yield number, worker.receive(function)
                idle.append(worker)
