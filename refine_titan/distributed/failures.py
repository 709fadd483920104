"""Finds out which rank failed first, on this node or another, and says so. Used by `launch.py`; written for torch 2.13.0's torchelastic."""

import json
import signal
import socket
import time
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch.distributed import DistNetworkError, DistStoreError, TCPStore
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

# A node that does not report its failure within this time counts as lost. torchelastic gives ranks 30 seconds to end.
REPORT_SECONDS = 40.0
# Causes, the most informative first: other ranks fail because one was killed, never the reverse.
KILLED, EXPLAINED, BROKEN = range(3)
# Errors whose message needs no traceback.
EXPLAINED_ERRORS = ("UserError: ", "ExtensionError: ", "EngineError: ")


@dataclass(frozen=True)
class Failure:
    """Why the ranks of a node ended.

    Attributes:
        cause: `KILLED`, `EXPLAINED` (an error that says what to correct) or `BROKEN` (any other error; it may be a consequence of the
            end of another rank).
        time: seconds since 1970.
        text: says which rank failed, where and how.
        traceback: with `BROKEN`, the traceback that the rank left, if any.
    """

    cause: int
    time: int
    text: str
    traceback: str = ""


def failure_of_node(error: ChildFailedError, node: int) -> Failure:
    """The failure that made the node's other ranks end: the earliest one. Ranks that notice the end of another one fail in the same second:
    a killed rank comes before them, and so does one whose error says what to correct."""
    begin = min(failure.timestamp for failure in error.failures.values())
    early = {rank: failure for rank, failure in error.failures.items() if failure.timestamp <= begin + 2}
    killed = [rank for rank, failure in early.items() if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM]
    rank = killed[0] if killed else min(early, key=lambda rank: (not _is_explained(early[rank]), early[rank].timestamp))
    failure = error.failures[rank]
    where = f"rank {rank} (local rank {failure.local_rank} of node {node}, {socket.gethostname()}, process {failure.pid})"
    if failure.exitcode < 0:
        return Failure(KILLED, failure.timestamp, f"error: {where} was killed by {failure.signal_name()}")
    message, traceback = _recorded_error(failure)
    for explained in EXPLAINED_ERRORS:
        if message.startswith(explained):
            return Failure(EXPLAINED, failure.timestamp, f"error on {where}: {message.removeprefix(explained)}")
    ending = f"ended with status {failure.exitcode}{f': {message}' if message else ''}"
    return Failure(BROKEN, failure.timestamp, f"error: {where} {ending}", traceback)


def _is_explained(failure: ProcessFailure) -> bool:
    return failure.exitcode >= 0 and _recorded_error(failure)[0].startswith(EXPLAINED_ERRORS)


def _recorded_error(failure: ProcessFailure) -> tuple[str, str]:
    """Message and traceback that a rank left in its error file; empty if it left none."""
    recorded = failure.error_file_data["message"]
    if isinstance(recorded, str):
        return "", ""
    return recorded["message"], recorded["extraInfo"]["py_callstack"]


class OtherNodes:
    """A connection between the launchers of a run's nodes, through node 0, so that each can say which rank of any node failed."""

    def __init__(self, address: str, port: int, node: int, num_nodes: int, ranks_per_node: int, timeout: timedelta):
        """Connects. Raises DistNetworkError or DistStoreError if node 0 cannot be reached, or cannot use the port."""
        self.address = address
        self.node = node
        self.num_nodes = num_nodes
        self.ranks_per_node = ranks_per_node
        # torchrun's rendezvous uses the same port; in this process both share one server.
        self._store = TCPStore(address, port, is_master=node == 0, timeout=timeout, wait_for_workers=False, multi_tenant=True)
        self._store.set(f"refine_titan/host/{node}", socket.gethostname())

    def explain(self, own: Failure) -> str:
        """Reports this node's failure to the other nodes, waits for theirs, and returns a text that says what happened."""
        try:
            failures = self._exchange(own)
            lost = [self._name(node, self._host(node)) for node in range(self.num_nodes) if node not in failures]
        except (DistNetworkError, DistStoreError):
            failures, lost = {self.node: own}, [self._name(0, self.address)]
        first = min(failure.cause for failure in failures.values())
        if first == BROKEN and lost:
            return f"{own.text}\nerror: before it, the run lost {', '.join(lost)}"
        causes = sorted((failure for failure in failures.values() if failure.cause == first), key=lambda failure: failure.time)
        traceback = [own.traceback] if first == BROKEN and own.traceback else []
        return "\n".join([*traceback, *(failure.text for failure in causes)])

    def _exchange(self, own: Failure) -> dict[int, Failure]:
        self._store.set(self._key(self.node), json.dumps(asdict(own)))
        deadline = time.monotonic() + REPORT_SECONDS
        while time.monotonic() < deadline and not self._store.check([self._key(node) for node in range(self.num_nodes)]):
            time.sleep(0.1)
        reported = [node for node in range(self.num_nodes) if self._store.check([self._key(node)])]
        failures = {node: Failure(**json.loads(self._store.get(self._key(node)))) for node in reported}
        if self.node == 0:
            time.sleep(1)  # the other nodes still read from this process
        return failures

    def _key(self, node: int) -> str:
        return f"refine_titan/failure/{node}"

    def _host(self, node: int) -> str:
        return self._store.get(f"refine_titan/host/{node}").decode()

    def _name(self, node: int, host: str) -> str:
        first = node * self.ranks_per_node
        return f"node {node} ({host}, ranks {first} to {first + self.ranks_per_node - 1})"
