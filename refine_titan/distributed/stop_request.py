"""SIGTERM and SIGUSR1 ask a run to stop: it finishes its step, writes a checkpoint, and ends with status 75."""

import os
import signal
import socket
import time
from types import FrameType

import torch
import torch.distributed as dist

from refine_titan.distributed.launched_rank import is_launched, stop_file, stopped_file

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# EX_TEMPFAIL of sysexits.h. It means: stopped on request; repeating the command continues the run.
STOPPED = 75
# A signal to a whole process tree reaches a rank and its launcher within milliseconds.
LAUNCHER_SECONDS = 2.0


class StopRequest:
    """Records whether this process has been asked to stop, by a signal or by its launcher. A context manager: it listens inside.

    Further signals change nothing, because schedulers repeat signals and send one kind after another.
    """

    def __init__(self):
        self._signal: signal.Signals | None = None
        self._file = stop_file() if is_launched() else None
        self._handlers_before = {}

    def __enter__(self) -> "StopRequest":
        self._handlers_before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def agreed(self, device: torch.device) -> signal.Signals | None:
        """The signal by which any rank has been asked to stop, or None. All ranks must call this, and all get the same answer.

        It costs an all-reduce of one number over all ranks, and nothing in a run of one process.
        """
        number = self.requested() or 0
        if dist.get_world_size() > 1:
            # A reduction of its own: no other one in a step spans tensor-parallel and data-parallel ranks.
            largest = torch.tensor(number, device=device)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            number = int(largest.item())
        return signal.Signals(number) if number else None

    def requested(self) -> signal.Signals | None:
        """The signal by which this process or its launcher has been asked to stop, or None."""
        if self._signal is None and self._file is not None and self._file.exists():
            self._signal = signal.Signals(int(self._file.read_text(encoding="utf-8")))
        return self._signal

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            return
        if self._file is None:
            announce(signal.Signals(number))
        else:
            deadline = time.monotonic() + LAUNCHER_SECONDS
            while not self._file.exists():
                if time.monotonic() > deadline:
                    # The launcher was not asked to stop: it is ending its ranks because one of them has failed.
                    signal.signal(number, signal.SIG_DFL)
                    os.kill(os.getpid(), number)
                time.sleep(0.01)
        self._signal = signal.Signals(number)


def stopped_status() -> int:
    """Exit status of a rank that has stopped on request: 75, or 0 under a launcher, which ends with 75 itself.

    The launcher would take any other status of a rank for a failure.
    """
    if not is_launched():
        return STOPPED
    stopped_file().touch()
    return 0


def announce(stop_signal: signal.Signals) -> None:
    """Prints what happens next. It writes to the file descriptor, because signal handlers call it, which may interrupt a print."""
    text = f"{stop_signal.name} on {socket.gethostname()}: the run stops after this step. Ctrl-C ends it at once.\n"
    os.write(2, text.encode())
