"""Starts a node's ranks: torchrun, with another way to stop and to report.

    python -m refine_titan.launch [options of torchrun] -m refine_titan.train [arguments]

torchrun (torch 2.13.0) answers SIGTERM by forwarding it, kills what is alive after 30 seconds, and ends with 1 whatever its ranks
returned. Here SIGTERM and SIGUSR1 leave the ranks under supervision until they have written their checkpoint, and the status is
75. Of a rank that fails, one message says which it was, where it ran and how it ended, without torchelastic's report.
"""

import os
import signal
import socket
import sys
import tempfile
from types import FrameType

import torch.distributed.elastic.multiprocessing.api as elastic
import torch.distributed.run as torchrun
from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from refine_titan.distributed.launched_rank import FOLDER_VARIABLE, stop_file, stopped_file
from refine_titan.distributed.stop_request import SIGNALS, STOPPED, announce
from refine_titan.monitoring.run_folder import write_atomically

ENDING_SIGNALS = ("SIGINT", "SIGHUP", "SIGQUIT")
# Errors whose message says everything.
PLAIN_ERRORS = ("UserError: ", "EngineError: ")


def main(arguments: list[str]) -> int:
    """Runs a node's ranks to their end; returns 0, 75 if they stopped on request, 1 if one failed, 128 + the signal that ended
    them at once."""
    names = ",".join((*ENDING_SIGNALS, *(number.name for number in SIGNALS)))
    options = torchrun.parse_args([f"--signals-to-handle={names}", *arguments])
    with tempfile.TemporaryDirectory(prefix="refine_titan_") as folder:
        os.environ[FOLDER_VARIABLE] = folder
        listen_once_ranks_run()
        try:
            torchrun.run(options)
        except ChildFailedError as error:
            if died_before_listening(error):
                return STOPPED
            print(describe_failure(error, options.node_rank, options.nnodes != "1"), file=sys.stderr)
            return 1
        except elastic.SignalException as error:
            return 128 + error.sigval
        except (DistNetworkError, DistStoreError) as error:
            print(f"error on {socket.gethostname()}: the nodes have not met, or have lost each other: {error}", file=sys.stderr)
            return 1
        return STOPPED if stopped_file().exists() else 0


def listen_once_ranks_run() -> None:
    """Takes the place of torchelastic's signal handler, which it installs when it starts the ranks. Before that a signal ends
    the launcher, as nothing is lost by it."""
    end_ranks = elastic._terminate_process_handler

    def on_signal(number: int, frame: FrameType | None) -> None:
        if number not in SIGNALS:
            end_ranks(number, frame)
        elif not stop_file().exists():
            write_atomically(stop_file(), str(int(number)))
            announce(signal.Signals(number))

    elastic._terminate_process_handler = on_signal


def died_before_listening(error: ChildFailedError) -> bool:
    """Whether the signal that asked for the stop reached ranks too, which were still starting and could not know it."""
    return stop_file().exists() and all(-failure.exitcode in SIGNALS for failure in error.failures.values())


def first_failure(error: ChildFailedError) -> tuple[int, ProcessFailure]:
    """The rank that the others of its node failed after: the earliest one, but a killed one before those that noticed it."""
    begin = min(failure.timestamp for failure in error.failures.values())
    early = {rank: failure for rank, failure in error.failures.items() if failure.timestamp <= begin + 2}
    killed = [rank for rank, failure in early.items() if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM]
    rank = killed[0] if killed else min(early, key=lambda rank: early[rank].timestamp)
    return rank, error.failures[rank]


def describe_failure(error: ChildFailedError, node: int, has_other_nodes: bool) -> str:
    """Which rank failed, where and how."""
    rank, failure = first_failure(error)
    where = f"rank {rank} (local rank {failure.local_rank} of node {node}, {socket.gethostname()}, process {failure.pid})"
    if failure.exitcode < 0:
        return f"error: {where} was killed by {failure.signal_name()}; all ranks end with it"
    message, traceback = error_of(failure)
    for plain in PLAIN_ERRORS:
        if message.startswith(plain):
            return f"error on {where}: {message.removeprefix(plain)}"
    lines = [traceback] if traceback else []
    lines.append(f"error: {where} ended with status {failure.exitcode}{f': {message}' if message else ''}")
    if has_other_nodes:
        lines.append("If it lost its connection, the rank that failed first is named by another node.")
    return "\n".join(lines)


def error_of(failure: ProcessFailure) -> tuple[str, str]:
    """Message and traceback that a rank left in its error file; empty where it left none."""
    recorded = failure.error_file_data["message"]
    if isinstance(recorded, str):
        return "", ""
    return recorded["message"], recorded["extraInfo"]["py_callstack"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
