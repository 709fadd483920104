"""Lets ranks exchange JSON values through the store at which they meet, and find out that one of them is gone.

A rank shows signs of life while it works. Whoever waits for it does so as long as it shows them, however long its work takes.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self, TypeVar

from refine_titan.errors import RunFailure, UserError

if TYPE_CHECKING:
    from torch.distributed import Store

# Seconds between two signs of life; without one for LOST_SECONDS a rank counts as lost.
BEAT_SECONDS = 10.0
LOST_SECONDS = 300.0
POLL_SECONDS = 0.2

Result = TypeVar("Result")
# Stores live as long as the process: rank 0 may be the one that serves the others.
_stores: list[Any] = []


class LostRankError(RunFailure):
    """Another rank has failed, or is gone."""


def open_store(name: str, rank: int, size: int) -> "Store":
    """The part `name` of the store at which the ranks of a launcher meet, before there is a process group."""
    from torch import distributed as dist

    store, *_ = next(dist.rendezvous("env://", rank, size))
    _stores.append(store)
    return dist.PrefixStore(f"refine_titan/{name}", store)


def rank_0_first(name: str, doing: str, work: Callable[[bool], Result]) -> Result:
    """Does the work of this rank of a run, once rank 0 has done its own: what rank 0 leaves in a file, the others find there.

    Args:
        name: a name for the ranks' messages, which no other call of the process has.
        doing: what rank 0 does, such as "reads the documents", for the message about its loss.
        work: is told whether this is rank 0.

    Raises:
        UserError: on every rank, if rank 0 fails.
        LostRankError: rank 0 is gone.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return work(True)
    messages = RankMessages(open_store(name, rank, size), rank, doing)
    if rank:
        messages.told("done", 0)
        return work(False)
    with messages.alive():
        return messages.tell("done", lambda: work(True), told=lambda found: None)


class RankMessages:
    """The messages of this rank and those for it. Every method raises LostRankError if the store is gone."""

    def __init__(self, store: "Store", rank: int, doing: str = ""):
        """
        Args:
            doing: what the ranks that are watched do, such as "downloads", for the message about a lost one.
        """
        self._store, self._rank, self._doing = store, rank, doing
        self._ended = threading.Event()
        # The ranks that this one watches, each with its last sign of life and when it changed.
        self._seen: dict[int, tuple[int | None, float]] = {}

    def has(self, key: str) -> bool:
        with _store_errors():
            return self._store.check([key])

    def get(self, key: str) -> Any:
        with _store_errors():
            return json.loads(self._store.get(key))

    def set(self, key: str, value: Any) -> None:
        with _store_errors():
            self._store.set(key, json.dumps(value))

    def take(self, key: str) -> Any:
        """Reads a value and removes it from the store."""
        value = self.get(key)
        with _store_errors():
            self._store.delete_key(key)
        return value

    def wait(self, key: str, check: Callable[[], None]) -> Any:
        """Waits for a value. `check` is called again and again, and raises if it will not come."""
        while not self.has(key):
            check()
            time.sleep(POLL_SECONDS)
        return self.get(key)

    def tell(self, key: str, work: Callable[[], Result], told: Callable[[Result], Any] = lambda found: found) -> Result:
        """Does the work of this rank, and tells the others `told(result)` or what went wrong."""
        try:
            found = work()
        except Exception as error:
            self.set(key, {"error": str(error) or type(error).__name__})
            raise
        self.set(key, {"value": told(found)})
        return found

    def told(self, key: str, rank: int) -> Any:
        """Waits for what the rank `rank` tells.

        Raises:
            UserError: its work went wrong.
            LostRankError: it is gone.
        """
        found = self.wait(key, lambda: self.watch(rank))
        if "error" in found:
            raise UserError(found["error"])
        return found["value"]

    @contextmanager
    def alive(self) -> Iterator[Self]:
        """Shows signs of life meanwhile, once."""
        self.begin_life()
        try:
            yield self
        finally:
            self.end_life()

    def begin_life(self) -> None:
        """Shows signs of life until `end_life`."""
        threading.Thread(target=self._beat, name="signs of life", daemon=True).start()

    def end_life(self) -> None:
        self._ended.set()

    def watch(self, rank: int) -> None:
        """Raises LostRankError if a rank has shown no sign of life for LOST_SECONDS; the time runs from the first call on."""
        beat = self.get(f"alive/{rank}") if self.has(f"alive/{rank}") else None
        last, since = self._seen.setdefault(rank, (beat, time.monotonic()))
        if beat != last:
            self._seen[rank] = beat, time.monotonic()
        elif time.monotonic() - since > LOST_SECONDS:
            who = f"rank {rank}, which {self._doing}," if self._doing else f"rank {rank}"
            raise LostRankError(f"{who} is lost: it has shown no sign of life for {LOST_SECONDS:.0f} seconds")

    def _beat(self) -> None:
        number = 0
        while True:
            try:
                self.set(f"alive/{self._rank}", number)
            except LostRankError:  # the rank's own thread finds the same
                return
            if self._ended.wait(BEAT_SECONDS):
                return
            number += 1


@contextmanager
def _store_errors() -> Iterator[None]:
    from torch.distributed import DistNetworkError, DistStoreError

    try:
        yield
    except (DistNetworkError, DistStoreError) as error:
        raise LostRankError(f"the node of rank 0 is lost: {error}") from error
