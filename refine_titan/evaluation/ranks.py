"""Lets several ranks share the samples of an evaluation.

Each rank has a whole model on a device of its own, and a process group of itself alone: ranks never compute together, so no answer and
no adaptation depends on how many there are. They exchange messages through torchrun's store, and none waits for a slower one:

- rank 0 tells which samples are finished; every rank takes its share of the rest (`runner.py`);
- a rank sends the lines of each batch to rank 0, which alone writes;
- every rank shows signs of life. One that shows none, or that ends with an error, ends the others.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torchtitan.tools.utils import device_type

from refine_titan.distributed.stop_request import StopRequest
from refine_titan.errors import UserError
from refine_titan.rank_messages import POLL_SECONDS, LostRankError, RankMessages


class Ranks:
    """This process as one of the ranks that share an evaluation.

    Attributes:
        rank, size: number of this rank, and of all ranks.
    """

    def __init__(self, store: dist.Store | None, rank: int = 0, size: int = 1, stop_request: StopRequest | None = None):
        """
        Args:
            store: what the ranks exchange messages through; None for a single rank.
            stop_request: asked after every batch; None if signals end the process at once.
        """
        self.rank, self.size = rank, size
        self._messages = None if store is None else RankMessages(store, rank)
        self._stop_request = stop_request
        self._sent = 0
        self._received = dict.fromkeys(range(1, size), 0)
        self._watched = set() if size == 1 else set(range(1, size)) if rank == 0 else {0}
        if size > 1:
            self._messages.begin_life()

    @classmethod
    def from_environment(cls, stop_request: StopRequest | None = None) -> Self:
        """Joins the ranks that torchrun has started; without torchrun this is the only rank.

        Afterwards the environment is that of a single rank, and the device that of this rank's number on its node.

        Raises:
            UserError: if the node has fewer devices than ranks.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls(None, stop_request=stop_request)
        store, rank, size = next(dist.rendezvous("env://"))
        local_rank = int(os.environ["LOCAL_RANK"])
        if device_type == "cuda":
            if local_rank >= torch.cuda.device_count():
                raise UserError(f"NGPU (--nproc-per-node) is more than {torch.cuda.device_count()}, the GPUs of {socket.gethostname()}")
            torch.cuda.set_device(local_rank)
        # vLLM reads LOCAL_RANK, which therefore stays: it is the device's number.
        os.environ.update({"RANK": "0", "WORLD_SIZE": "1"})
        return cls(dist.PrefixStore("refine_titan/evaluation", store), rank, size, stop_request)

    @property
    def is_writer(self) -> bool:
        return self.rank == 0

    def share(self, name: str, value: Any = None) -> None:
        """Tells the other ranks a JSON value; only rank 0 may."""
        if self.size > 1:
            self._messages.set(f"shared/{name}", value)

    def shared(self, name: str) -> Any:
        """Waits for the value that rank 0 shares under a name.

        Raises:
            LostRankError: another rank has failed or is lost.
        """
        return self._messages.wait(f"shared/{name}", self.check)

    def send(self, lines: list[dict[str, Any]]) -> None:
        """Sends finished samples to rank 0. Raises LostRankError if another rank has failed or is lost."""
        self.check()
        for line in lines:  # one by one, as the store limits a value to 8 MiB
            self._messages.set(f"lines/{self.rank}/{self._sent}", line)
            self._sent += 1

    def receive(self) -> list[dict[str, Any]]:
        """Returns the samples that have come to rank 0 since the last call.

        Raises:
            LostRankError: another rank has failed or is lost.
        """
        lines = []
        for rank in list(self._received):
            has_ended = self._messages.has(f"ended/{rank}")
            while self._messages.has(key := f"lines/{rank}/{self._received[rank]}"):
                lines.append(self._messages.take(key))
                self._received[rank] += 1
            if has_ended:
                del self._received[rank]
                self._watched.discard(rank)
        return lines

    def receive_rest(self) -> Iterator[list[dict[str, Any]]]:
        """Yields samples as they come to rank 0, until every other rank has ended its share.

        Raises:
            LostRankError: another rank has failed or is lost.
        """
        while self._received:
            yield self.receive()
            self.check()
            if self._received:
                time.sleep(POLL_SECONDS)

    def end(self) -> None:
        """Tells rank 0 that this rank has sent everything."""
        if self.rank:
            self._messages.set(f"ended/{self.rank}", None)

    def should_stop(self) -> bool:
        """Whether any rank has been asked to stop."""
        asked = self._stop_request is not None and self._stop_request.requested() is not None
        if self.size == 1:
            return asked
        if asked:
            self._messages.set("stop", None)
        return asked or self._messages.has("stop")

    def check(self) -> None:
        """Raises LostRankError if another rank has failed, or shows no sign of life."""
        if self.size > 1 and self._messages.has("failed"):
            raise LostRankError(self._messages.get("failed"))
        for rank in self._watched:
            self._messages.watch(rank)

    def tell_failure(self, happened: str) -> None:
        """Ends the other ranks. `happened` says what this rank did, such as "was interrupted"."""
        if self.size > 1:
            with suppress(LostRankError):
                self._messages.set("failed", f"rank {self.rank} ({socket.gethostname()}) {happened}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.size > 1:
            self._messages.end_life()
        if error is not None and not isinstance(error, LostRankError):
            self.tell_failure(f"has failed: {error or kind.__name__}")
