"""Starts the ranks of a node: torchrun, with another way to stop and to report failures.

    python -m refine_titan.launch [options of torchrun] -m refine_titan.train [arguments]

On SIGTERM torchrun (torch 2.13.0) forwards the signal, kills the ranks that are alive after 30 seconds, and exits with 1 whatever the
ranks returned. This launcher waits, on SIGTERM and SIGUSR1, until the ranks have written their checkpoint, and exits with 75. If a rank
fails, every node prints which rank it was, where it ran and how it ended, without torchelastic's report.
"""

import argparse
import os
import signal
import socket
import sys
import tempfile
from datetime import timedelta
from types import FrameType

import torch.distributed.elastic.multiprocessing.api as elastic
import torch.distributed.run as torchrun
from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from refine_titan.distributed.failures import OtherNodes, failure_of_node
from refine_titan.distributed.launched_rank import FOLDER_VARIABLE, stop_file, stopped_file
from refine_titan.distributed.loopback import private_interfaces, register_rendezvous
from refine_titan.distributed.stop_request import SIGNALS, STOPPED, announce
from refine_titan.files.whole_files import write_atomically
from refine_titan.terminal import INTERRUPTED, begin_log, leave_out_logger, raise_when_interrupted, share_columns, show

ENDING_SIGNALS = ("SIGINT", "SIGHUP", "SIGQUIT")
# How long a node waits for the others to start; torchrun's default.
MEETING_TIMEOUT = timedelta(minutes=10)


def main(arguments: list[str]) -> int:
    """Runs the ranks of a node to their end and returns the exit status.

    The status is 0; 75 if the ranks stopped on request; 1 if one failed; or 128 + the number of the signal that ended them at once.
    """
    raise_when_interrupted()
    begin_log()
    # What they say this launcher says itself: which signal came, and which rank failed, where and how.
    leave_out_logger("torch.distributed.elastic")
    leave_out_logger("torch.distributed.run")
    share_columns()
    names = ",".join((*ENDING_SIGNALS, *(number.name for number in SIGNALS)))
    options = torchrun.parse_args([f"--signals-to-handle={names}", *arguments])
    with tempfile.TemporaryDirectory(prefix="refine_titan_") as folder:
        os.environ[FOLDER_VARIABLE] = folder
        listen_once_ranks_run()
        register_rendezvous()
        nodes = None
        try:
            nodes = meet(options)
            torchrun.run(options)
        except ChildFailedError as error:
            if died_before_listening(error):
                return STOPPED
            failure = failure_of_node(error, options.node_rank)
            if nodes is not None:
                show(nodes.explain(failure), sys.stderr)
            else:
                show("\n".join(filter(None, (failure.traceback, failure.text))), sys.stderr)
            return 1
        except elastic.SignalException as error:
            return 128 + error.sigval
        except KeyboardInterrupt:  # before torchelastic handles signals
            return INTERRUPTED
        except (DistNetworkError, DistStoreError) as error:
            place = f"MASTER_ADDR={options.master_addr} MASTER_PORT={options.master_port}"
            print(f"error on {socket.gethostname()}: the nodes cannot meet at {place}: {error}", file=sys.stderr)
            return 1
        return STOPPED if stopped_file().exists() else 0


def meet(options: argparse.Namespace) -> OtherNodes | None:
    """Connects this launcher to those of the other nodes, if there are any.

    Raises:
        DistNetworkError, DistStoreError: node 0 did not start in time.
    """
    num_nodes = torchrun.parse_min_max_nnodes(options.nnodes)[1]
    if num_nodes == 1:
        os.environ.update(private_interfaces())
        return None
    ranks = torchrun.determine_local_world_size(options.nproc_per_node)
    return OtherNodes(options.master_addr, int(options.master_port), options.node_rank, num_nodes, ranks, MEETING_TIMEOUT)


def listen_once_ranks_run() -> None:
    """Replaces the signal handler that torchelastic installs when it starts the ranks. A signal before that ends the launcher at once;
    nothing is lost by then."""
    end_ranks = elastic._terminate_process_handler
    is_asked = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal is_asked
        if number not in SIGNALS:
            end_ranks(number, frame)
        elif not is_asked:
            is_asked = True  # a second signal may come while the file is written
            write_atomically(stop_file(), str(int(number)))
            announce(signal.Signals(number))

    elastic._terminate_process_handler = on_signal


def died_before_listening(error: ChildFailedError) -> bool:
    """Whether the signal that asked for the stop also reached a rank that was still starting and did not listen yet."""
    return stop_file().exists() and any(-failure.exitcode in SIGNALS for failure in error.failures.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
