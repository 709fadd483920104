"""Lets the ranks of a run fetch what names of the Hub stand for: rank 0 finds the commits, one rank of each node downloads, others wait.

The ranks of a run must train from one commit, even if somebody pushes another while they start, and a node's cache needs one download.
They talk through the store at which torchrun's ranks meet, before there is a process group.
"""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from refine_titan.hub.cache import Wanted, fetch, find_commit
from refine_titan.rank_messages import RankMessages, open_store


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
        return open_store("hub", self.rank, self.size)

    def fetch(self, wanted: Sequence[Wanted]) -> list[tuple[str, Path | None]]:
        """Fetches what all ranks want alike; returns the commit of each, and the folder of each model.

        Raises:
            UserError: on every rank, if one cannot have it.
            LostRankError: the rank that this one waits for is gone.
        """
        if not wanted:
            return []
        if self.size == 1:
            return _fetch_all(wanted, _find_commits(wanted))
        with self._messages().alive() as messages:
            if self.rank == 0:
                commits = messages.tell("commits", lambda: _find_commits(wanted))
            else:
                commits = messages.told("commits", 0)
            node = f"node_{self.node}"
            if self.local_rank == 0:
                return messages.tell(node, lambda: _fetch_all(wanted, commits), told=lambda found: None)
            messages.told(node, self.rank - self.local_rank)
        return _fetch_all(wanted, commits)  # the cache holds everything

    def _messages(self) -> RankMessages:
        """Those of a call alone."""
        from torch.distributed import PrefixStore

        self._calls += 1
        return RankMessages(PrefixStore(str(self._calls), self._store), self.rank, "downloads from the Hub")


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
