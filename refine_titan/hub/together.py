"""Lets the ranks of a run fetch what names of the Hub stand for: rank 0 finds the commits, one rank of each node downloads, others wait.

The ranks of a run must train from one commit, even if somebody pushes another while they start, and a node's cache needs one download.
They talk through the store at which torchrun's ranks meet, before there is a process group. Whoever waits does so as long as the rank
that works shows signs of life, however long its download takes.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from refine_titan.errors import UserError
from refine_titan.hub.cache import Wanted, fetch, find_commit

# Seconds between two signs of life; without one for LOST_SECONDS the rank that works counts as lost.
BEAT_SECONDS = 10.0
LOST_SECONDS = 300.0
POLL_SECONDS = 0.2

# Stores live as long as the process: rank 0 may be the one that serves the others.
_stores: list[Any] = []


class Companions:
    """This process as one of the ranks of a run.

    Attributes:
        rank, size: number of this rank, and of all.
        local_rank, node: its number on its node, and the node's.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, node: int = 0):
        self.rank, self.size, self.local_rank, self.node = rank, size, local_rank, node
        self._calls = 0

    @classmethod
    def from_environment(cls) -> Self:
        """The ranks that a launcher has started; this process alone without one. They are not connected before they have to be."""
        rank = int(os.environ.get("RANK", "0"))
        local_rank, node = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("GROUP_RANK", "0"))
        return cls(rank, int(os.environ.get("WORLD_SIZE", "1")), local_rank, node)

    @cached_property
    def _store(self) -> Any:
        from torch import distributed as dist

        store, *_ = next(dist.rendezvous("env://", self.rank, self.size))
        _stores.append(store)
        return dist.PrefixStore("refine_titan/hub", store)

    def fetch(self, wanted: Sequence[Wanted]) -> list[tuple[str, Path | None]]:
        """Fetches what all ranks want alike; returns the commit of each, and the folder of each model.

        Raises:
            UserError: on every rank, if one cannot have it, or shows no sign of life.
        """
        if not wanted:
            return []
        if self.size == 1:
            return _fetch_all(wanted, _find_commits(wanted))
        self._calls += 1
        if self.rank == 0:
            commits = self._work("commits", 0, lambda: _find_commits(wanted))
        else:
            commits = self._await("commits", 0)
        if self.local_rank == 0:
            return self._work(f"node_{self.node}", self.rank, lambda: _fetch_all(wanted, commits), tell=lambda found: None)
        self._await(f"node_{self.node}", self.rank - self.local_rank)
        return _fetch_all(wanted, commits)  # the cache holds everything

    def _work(self, name: str, rank: int, work: Callable[[], Any], tell: Callable[[Any], Any] = lambda found: found) -> Any:
        """Does the work of one rank, shows signs of life meanwhile, and tells the others `tell(result)` or what went wrong."""
        with self._alive(rank):
            try:
                found = work()
            except Exception as error:
                self._set(name, {"error": str(error) or type(error).__name__})
                raise
            self._set(name, {"value": tell(found)})
        return found

    def _await(self, name: str, rank: int) -> Any:
        """Waits for what the rank `rank` tells under a name."""
        beat, since = b"", time.monotonic()
        while not self._has(name):
            now = self._get(f"alive_{rank}") if self._has(f"alive_{rank}") else b""
            if now != beat:
                beat, since = now, time.monotonic()
            elif time.monotonic() - since > LOST_SECONDS:
                raise UserError(f"rank {rank}, which downloads from the Hub, has shown no sign of life for {LOST_SECONDS:.0f} seconds")
            time.sleep(POLL_SECONDS)
        told = self._get(name)
        if "error" in told:
            raise UserError(told["error"])
        return told["value"]

    @contextmanager
    def _alive(self, rank: int) -> Iterator[None]:
        ended = threading.Event()

        def beat() -> None:
            number = 0
            while not ended.wait(BEAT_SECONDS if number else 0):
                number += 1
                self._set(f"alive_{rank}", number)

        thread = threading.Thread(target=beat, name="signs of life", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _key(self, name: str) -> str:
        return f"{self._calls}/{name}"

    def _has(self, name: str) -> bool:
        return self._store.check([self._key(name)])

    def _get(self, name: str) -> Any:
        return json.loads(self._store.get(self._key(name)))

    def _set(self, name: str, value: Any) -> None:
        self._store.set(self._key(name), json.dumps(value))


def _find_commits(wanted: Sequence[Wanted]) -> list[str]:
    """The commit of each; settings that name the same are given the same."""
    found: dict[Any, str] = {}
    for item in wanted:
        if (item.kind, item.name) not in found:
            found[item.kind, item.name] = find_commit(item)
    return [found[item.kind, item.name] for item in wanted]


def _fetch_all(wanted: Sequence[Wanted], commits: Sequence[str]) -> list[tuple[str, Path | None]]:
    """Commit of each, and its folder; a data set has none, because it is streamed."""
    found: dict[Any, Path] = {}
    pinned = [item.at(commit) for item, commit in zip(wanted, commits)]
    for item in sorted(pinned, key=lambda item: not item.weights):  # with the weights first: the others are then there
        if item.kind == "model" and item.name not in found:
            found[item.name] = fetch(item)
    return [(commit, found.get(item.name) if item.kind == "model" else None) for item, commit in zip(pinned, commits)]
