"""Ranks that share an evaluation, as objects of one process over one store."""

import time

import pytest
import torch.distributed as dist

from refine_titan import rank_messages
from refine_titan.benchmarks.samples import Sample
from refine_titan.data.tokenizer import ByteTokenizer
from refine_titan.evaluation.prompts import AnswerProtocol, prepare_prompt
from refine_titan.evaluation.ranks import Ranks
from refine_titan.evaluation.runner import UnfinishedWork
from refine_titan.evaluation.sample_log import SampleKey
from refine_titan.evaluation.work import Work
from refine_titan.rank_messages import LostRankError


@pytest.fixture
def three(monkeypatch):
    monkeypatch.setattr(rank_messages, "POLL_SECONDS", 0.001)
    store = dist.HashStore()
    together = [Ranks(store, rank, 3) for rank in range(3)]
    yield together
    for one in together:
        one.__exit__(None, None, None)


def test_lines_of_all_ranks_come_to_rank_0_until_all_have_ended(three):
    writer, *others = three
    text = "\ud800 half a surrogate, \u2028 and NaN"
    others[1].send([{"response": text, "nll": 0.1 + 0.2}, {"index": 1}])
    assert writer.receive() == [{"response": text, "nll": 0.1 + 0.2}, {"index": 1}] and writer.receive() == []
    others[0].send([{"index": 2}])
    for other in others:
        other.end()
    assert [line for lines in writer.receive_rest() for line in lines] == [{"index": 2}]
    assert list(writer.receive_rest()) == []


def test_what_rank_0_shares_reaches_the_others(three):
    writer, *others = three
    writer.share("work", {"finished": [True, False]})
    assert [other.shared("work") for other in others] == [{"finished": [True, False]}] * 2


def test_failure_of_a_rank_ends_the_others_with_its_message(three):
    writer, failing, other = three
    with pytest.raises(ValueError), failing:
        raise ValueError("the third layer is on fire")
    for one in (writer, other):
        with pytest.raises(LostRankError, match=r"rank 1 \(.*\) has failed: the third layer is on fire"):
            one.check()
    with pytest.raises(LostRankError, match="rank 1"):
        other.shared("work")


def test_rank_without_sign_of_life_is_lost(monkeypatch):
    monkeypatch.setattr(rank_messages, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(rank_messages, "LOST_SECONDS", 0.5)
    monkeypatch.setattr(rank_messages, "POLL_SECONDS", 0.01)
    store = dist.HashStore()
    with Ranks(store, 0, 2) as writer, Ranks(store, 1, 2) as other:
        end = time.monotonic() + 0.8
        while time.monotonic() < end:
            writer.check()
            other.check()
            time.sleep(0.05)
        other._messages.end_life()  # its process is gone
        with pytest.raises(LostRankError, match="rank 1 is lost: it has shown no sign of life for"):
            list(writer.receive_rest())


class Asked:
    def requested(self):
        return 15


def test_request_to_stop_one_rank_stops_all(monkeypatch):
    store = dist.HashStore()
    with Ranks(store, 0, 2) as writer, Ranks(store, 1, 2, Asked()) as other:
        assert not writer.should_stop()
        assert other.should_stop() and writer.should_stop()


def test_single_rank_needs_no_store(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with Ranks.from_environment() as alone:
        alone.check()
        alone.end()
        assert alone.is_writer and not alone.should_stop() and alone.receive() == [] and list(alone.receive_rest()) == []


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 9])
def test_shares_hold_every_unfinished_sample_once_in_the_batches_of_one_rank(num_ranks):
    protocol = AnswerProtocol(0.0, 0, "middle", 100, 200, False)
    prompts = [
        prepare_prompt(Sample("longbench", "hotpotqa", i, "word " * (i % 7 + 1), ("a",), 4), protocol, ByteTokenizer()) for i in range(20)
    ]
    work = Work(("task",), prompts, [], {}, ())
    finished = {SampleKey.from_sample(prompts[i].sample) for i in (0, 6, 13, 19)}
    whole = UnfinishedWork.of(work, finished, 3, False)
    shares = [whole.share_of(rank, num_ranks) for rank in range(num_ranks)]
    dealt = [batch for share in shares for batch in share.batches]
    assert sorted(map(id, (batch for batch, _ in dealt))) == sorted(id(batch) for batch, _ in whole.batches)
    assert sum(len(rest) for _, rest in dealt) == 16 and sum(share.prompt_tokens for share in shares) == whole.prompt_tokens
    tokens = [share.prompt_tokens for share in shares]
    assert num_ranks == 9 or max(tokens) <= 1.7 * min(tokens)
