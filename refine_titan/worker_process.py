"""A process that calls functions for its parent, one after the other.

It is a new interpreter, so it inherits no threads, no CUDA context and no locks, and it does not import the parent's main module, as
`multiprocessing` does. It sees no GPU. It ends when the parent ends, however the parent ends, and no signal that is meant for the parent
ends it: a stop request reaches every process of a job, and the parent may need the worker for its last step.
"""

import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

from refine_titan.errors import RunFailure, UserError

# Signals by which people, terminals and schedulers end or stop a job. The parent answers to them.
_SIGNALS_OF_PARENT = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
# How long a worker that has closed its connection may take until its exit status is known.
_SECONDS_TO_END = 5.0


class WorkerDied(RunFailure):
    """A worker process ended unexpectedly; `was_killed` says whether by SIGKILL, as the system does when memory runs out."""

    def __init__(self, message: str, was_killed: bool = False):
        super().__init__(message)
        self.was_killed = was_killed


class WorkerProcess:
    """Starts a worker, which ends at the latest with this object.

    Attributes:
        connection: becomes readable when there is an answer, or when the worker has died.
    """

    def __init__(self):
        ours, theirs = socket.socketpair()
        program = f"import sys; sys.path = {sys.path!r}; from refine_titan.worker_process import serve; serve({theirs.fileno()})"
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with theirs:
            # A process inherits which signals are blocked, so that none can end it while it starts.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS_OF_PARENT)
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", program], pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self.connection = Connection(ours.detach())
        self.end = weakref.finalize(self, _end, self._process, self.connection)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, function: Callable, *arguments: Any) -> None:
        """Lets the worker call a function of a module. Calls that wait are made in the order in which they were sent.

        Raises:
            WorkerDied: the worker has ended.
        """
        try:
            self.connection.send((function, arguments))
        except (BrokenPipeError, ConnectionResetError):
            raise self._died(function.__name__) from None

    def receive(self, function: Callable) -> Any:
        """What the oldest call returned whose answer has not been taken yet. Waits for it; `function` is named in errors.

        Raises:
            UserError, OSError: the function raised it.
            WorkerDied: the worker has ended.
            RuntimeError: the function raised another exception.
        """
        try:
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            raise self._died(function.__name__) from None
        if kind == "result":
            return value
        if kind == "error":
            raise value
        raise RuntimeError(f"a worker process failed during {function.__name__}:\n{value}")

    def _died(self, doing: str) -> WorkerDied:
        try:
            status = self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            return WorkerDied(f"a worker process closed its connection during {doing}")
        if status >= 0:
            return WorkerDied(f"a worker process ended with status {status} during {doing}")
        was_killed = status == -signal.SIGKILL
        hint = "; memory may have run out" if was_killed else ""
        return WorkerDied(f"a worker process ended by signal {signal.Signals(-status).name} during {doing}{hint}", was_killed)


def _end(process: subprocess.Popen, connection: Connection) -> None:
    process.kill()
    process.wait()
    connection.close()


def serve(fd: int) -> None:
    """Calls the functions that arrive at a socket, and sends their answers, until the parent is gone."""
    connection, answers = Connection(fd), queue.SimpleQueue()
    threading.Thread(target=_end_with_parent, args=(fd,), daemon=True).start()
    # A thread sends, so that the next call does not wait until the parent has taken the answer of the last one.
    threading.Thread(target=_send_answers, args=(connection, answers), daemon=True).start()
    while True:
        try:
            request = connection.recv_bytes()
        except (EOFError, OSError):
            os._exit(1)
        answers.put(_answer(request))


def _answer(request: bytes) -> Any:
    try:
        function, arguments = ForkingPickler.loads(request)
        return ForkingPickler.dumps(("result", function(*arguments)))
    except UserError as error:
        return ForkingPickler.dumps(("error", UserError(str(error))))
    except OSError as error:
        return ForkingPickler.dumps(("error", OSError(error.errno, error.strerror or str(error), error.filename)))
    except BaseException:  # the parent has to report it, whatever it is
        return ForkingPickler.dumps(("failure", traceback.format_exc()))


def _send_answers(connection: Connection, answers: queue.SimpleQueue) -> None:
    while True:
        connection.send_bytes(answers.get())


def _end_with_parent(fd: int) -> None:
    hangup = select.poll()
    hangup.register(fd, 0)
    hangup.poll()
    os._exit(1)
