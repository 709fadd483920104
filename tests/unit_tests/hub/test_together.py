"""Several ranks: one finds the commit, one of each node downloads, the others wait, and not for ever."""

import threading
import time

import pytest
from torch.distributed import HashStore

from refine_titan import rank_messages
from refine_titan.errors import UserError
from refine_titan.hub import together
from refine_titan.hub.cache import Wanted
from refine_titan.hub.names import HubName
from refine_titan.hub.together import Companions
from refine_titan.rank_messages import LostRankError

WANTED = [Wanted("model.hf_assets_path", HubName("owner/model"))]


def ranks(nodes: int = 2, on_each: int = 2) -> list[Companions]:
    store, found = HashStore(), []
    for rank in range(nodes * on_each):
        companions = Companions(rank, nodes * on_each, rank % on_each, rank // on_each)
        companions.__dict__["_store"] = store
        found.append(companions)
    return found


def run(work) -> list:
    """What `work(rank)` returns or raises, each in a thread of its own."""
    results = [None] * len(work)

    def call(i):
        try:
            results[i] = work[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results


def test_one_rank_of_each_node_downloads_the_commit_of_rank_0(monkeypatch):
    commits, began, ended = iter("abcd"), [], []

    def fetch(wanted):
        began.append((wanted.name.revision, len(ended)))
        time.sleep(0.3)
        ended.append(time.monotonic())

    def find_commit(wanted):
        return next(commits) * 40

    monkeypatch.setattr(together, "find_commit", find_commit)
    monkeypatch.setattr(together, "fetch", fetch)
    results = run([lambda c=c: c.fetch(WANTED) for c in ranks()])
    assert [commit for [(commit, _)] in results] == ["a" * 40] * 4
    assert {commit for commit, _ in began} == {"a" * 40}
    assert [done for _, done in began[:2]] == [0, 0] and all(done >= 1 for _, done in began[2:])  # the other ranks after their node's first


def test_what_one_cannot_have_no_rank_has(monkeypatch):
    def find_commit(wanted):
        raise UserError("no such model")

    monkeypatch.setattr(together, "find_commit", find_commit)
    results = run([lambda c=c: c.fetch(WANTED) for c in ranks()])
    assert [str(error) for error in results] == ["no such model"] * 4 and all(isinstance(error, UserError) for error in results)


def test_a_download_that_fails_on_a_node_ends_its_ranks(monkeypatch):
    monkeypatch.setattr(together, "find_commit", lambda wanted: "a" * 40)

    def fetch(wanted):
        raise OSError(28, "No space left on device", "/cache")

    monkeypatch.setattr(together, "fetch", fetch)
    results = run([lambda c=c: c.fetch(WANTED) for c in ranks(nodes=1)])
    assert isinstance(results[0], OSError) and "No space left on device" in str(results[1])


def test_a_rank_that_is_gone_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(rank_messages, "LOST_SECONDS", 0.5)
    before = time.monotonic()
    with pytest.raises(LostRankError, match="rank 0, which downloads from the Hub, is lost: it has shown no sign of life for 0 seconds"):
        ranks()[3].fetch(WANTED)
    assert time.monotonic() - before < 10


def test_a_long_download_is_waited_for(monkeypatch):
    monkeypatch.setattr(rank_messages, "LOST_SECONDS", 0.6)
    monkeypatch.setattr(rank_messages, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(together, "find_commit", lambda wanted: time.sleep(2) or "a" * 40)
    monkeypatch.setattr(together, "fetch", lambda wanted: "folder")
    assert run([lambda c=c: c.fetch(WANTED) for c in ranks(nodes=1)]) == [[("a" * 40, "folder")]] * 2
