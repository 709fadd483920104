"""Hybrids in vLLM: keys, values and states that are handed over together. Real vLLM, no mock. Legend: n rollouts, k tokens."""

from contextlib import closing
from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm", reason="needs the extra cpu or gpu")

from transformers import AutoConfig
from transformers.models.qwen3_5 import Qwen3_5TextConfig
from vllm import ModelRegistry

from refine_titan.models.context_shard import ContextShard
from refine_titan.models.shared_prefix import read_with_snapshots
from refine_titan.rollout import vllm_handover, vllm_runtime
from refine_titan.rollout.completion import CompletionRequest
from refine_titan.rollout.continuation import replay_prefixes
from refine_titan.rollout.engine import PrefixStates
from refine_titan.rollout.page_pool import PagePool
from refine_titan.rollout.vllm_pages import PagedState
from tests.integration_tests.vllm_engines import build_engine, compare, random_model, rollout_request, single_rank, small_args

# Both float32; they differ in how rows are grouped.
GAP = 1e-4
# A page has 96 tokens. Two documents; prefixes that end before, at and after the border of a page, some of them twice.
PAGE = 96
CU_SEQLENS = (0, 700, 1000)
STARTS = (1, 2, 95, 96, 97, 97, 98, 192, 193, 193, 194, 480, 481, 700, 701, 702, 797, 797, 1000)


@pytest.fixture(scope="module", autouse=True)
def process_group():
    with single_rank():
        yield


@pytest.fixture(scope="module")
def model():
    return random_model(small_args("qwen3_5"))


@pytest.fixture(scope="module")
def engine(model):
    with closing(build_engine(model, prefixes="handed_over", max_model_len=1024)) as engine:
        yield engine


def states_of(model, stream) -> PrefixStates:
    with torch.no_grad():
        _, bank = read_with_snapshots(model, stream, ContextShard.of_rank(CU_SEQLENS, None), 64)
        return replay_prefixes(model, bank, stream, STARTS)


def poison(engine, patch) -> None:
    """Fills what no step has written: NaN for states; for keys and values 100, as those of masked tokens are multiplied by zero. vLLM
    gives new pages of keys and values zeros, which would be nearly right."""
    pages = vllm_runtime.engine_model(engine._llm).pages
    for each in pages:
        each.fill(torch.nan)
    runner = vllm_runtime._model_runner(engine._llm)
    kernels = list(vllm_runtime.engine_model(engine._llm).kernels)
    patch.setattr(runner, "_zero_block_ids", lambda ids: [kernel.kv_cache[i].fill_(100.0) for kernel in kernels for i in ids])


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (CU_SEQLENS[-1],), generator=torch.Generator().manual_seed(seed))


def sample(model, engine, seed: int = 0, version: int = 0, temperature: float = 0.0):
    """Rollouts of 8 tokens, which cross borders of pages, with the prefixes' states; and how they compare with the trainer's."""
    wanted = rollout_request(tokens(seed), STARTS, CU_SEQLENS, length=8, version=version, temperature=temperature)
    rollouts = engine.generate(wanted, states_of(model, wanted.tokens_T))
    return rollouts, compare(model, wanted, rollouts)


def test_pages_are_written_before_they_are_read_and_shared_between_rollouts(model, engine, monkeypatch):
    assert PagePool.of(model.model_args, torch.float32).block_tokens == PAGE
    poison(engine, monkeypatch)
    written = []
    original = vllm_handover.write_keys_and_values
    monkeypatch.setattr(
        vllm_handover, "write_keys_and_values", lambda layer, slots, *kv: written.append(len(slots)) or original(layer, slots, *kv)
    )
    # A full page is written once, in the first round. Besides it, each rollout is given what follows its last full page.
    for temperature, full in ((0.0, CU_SEQLENS[-1]), (1.0, 0)):
        written.clear()
        rollouts, found = sample(model, engine, temperature=temperature)
        assert (found.greedy or temperature > 0) and found.gap < GAP
        assert rollouts.prefilled_tokens == len(STARTS)  # the last token of each
        assert sum(written) < full + len(STARTS) * PAGE


def test_answers_of_the_same_engine_read_their_prompts(model, engine):
    """Nothing is handed over to them. They go on from pages that rollouts have left, and leave pages to rollouts."""
    engine.sync_weights(0)
    stream, prompts = tokens(), [(0, 97), (0, 481), (0, 700), (700, 797), (700, 1000)]
    wanted = CompletionRequest(tuple(tuple(stream[a:b].tolist()) for a, b in prompts), (8,) * 5, (0,) * 5)
    answers = [completion.tokens for completion in engine.complete(wanted, str)]
    rollouts, found = sample(model, engine)
    expected = dict(zip(STARTS, map(tuple, rollouts.tokens_nk.tolist())))
    assert found.greedy and found.gap < GAP and rollouts.prefilled_tokens == len(STARTS)
    assert answers == [expected[end] for _, end in prompts]
    assert answers == [completion.tokens for completion in engine.complete(wanted, str)]


def test_prefixes_whose_states_were_overwritten_are_handed_over_again(model, monkeypatch):
    """In the memory that a round needs, states are kept for no longer than a rollout runs, while keys and values of its prefix remain."""
    pool = PagePool.of(model.model_args, torch.float32)
    blocks = 4 * (pool.state_blocks(2) + pool.own_blocks(8, True)) + pool.shared_blocks(CU_SEQLENS[-1]) + 1
    with closing(build_engine(model, prefixes="handed_over", max_model_len=1024, cache_bytes=blocks * pool.block_bytes)) as engine:
        poison(engine, monkeypatch)
        for seed in range(3):
            rollouts, found = sample(model, engine, seed)
            assert found.greedy and found.gap < GAP and rollouts.prefilled_tokens == len(STARTS)


def unwritten_values(layer, slots, keys, values, original=vllm_handover.write_keys_and_values):
    original(layer, slots[:-1], keys[:-1], values[:-1])


def unwritten_state(self, slots, states, original=PagedState.write):
    original(self, slots[1:], states.select(torch.arange(1, len(slots))))


@pytest.mark.parametrize(
    "owner, name, broken",
    [
        (vllm_handover, "write_keys_and_values", unwritten_values),
        (PagedState, "write", unwritten_state),
        (vllm_handover, "state_columns", lambda num_tokens, num_blocks, block_tokens: {num_blocks - 1}),
    ],
    ids=["one token's keys and values", "a state", "the state at the border of a page"],
)
def test_a_page_that_is_not_written_is_seen(model, engine, monkeypatch, owner, name, broken):
    """The control of the test above: without one of the writes it fails."""
    engine.sync_weights(0)
    poison(engine, monkeypatch)
    monkeypatch.setattr(owner, name, broken)
    _, found = sample(model, engine)
    assert not found.gap < 0.01
    monkeypatch.undo()
    engine.sync_weights(0)
    assert sample(model, engine)[1].gap < GAP


def test_keys_and_values_of_earlier_weights_are_forgotten(model, engine, monkeypatch):
    """And the control: without forgetting them, the rollouts are those of no model."""
    engine.sync_weights(0)
    sample(model, engine)
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    try:
        for version, forgets in ((1, False), (2, True)):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(version)))
            with pytest.MonkeyPatch.context() as patch:
                if not forgets:
                    patch.setattr(engine, "_forget_states", lambda: None)
                engine.sync_weights(version)
            _, found = sample(model, engine, version=version)
            assert found.gap < GAP if forgets else found.gap > 0.01
    finally:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(original[name])
        engine.sync_weights(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, options",
    [
        ("olmo_hybrid", {}),
        ("gated_delta_net", {"attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True}}),
        ("gated_delta_product", {"n_layers": 5, "attn": {"layers": [0, 3], "num_heads": 2}}),
        ("kda", {"n_layers": 3, "attn": {"layers": [1, 2], "num_heads": 8}}),
        ("delta_net", {"attn": {"layers": [0], "num_heads": 1}}),
    ],
)
@pytest.mark.parametrize("prefixes", ["handed_over", "cached", "recomputed"])
def test_rollouts_of_every_kind_of_hybrid_are_the_trainers(family, options, prefixes, monkeypatch):
    """Groups of layers of every size, filled up with none; queries that share keys, heads of 32 to 256 channels."""
    model = random_model(replace(small_args(family), **options))
    with closing(build_engine(model, prefixes=prefixes, max_model_len=1024)) as engine:
        poison(engine, monkeypatch)
        for temperature in (0.0, 1.0):
            rollouts, found = sample(model, engine, temperature=temperature)
            assert (found.greedy or temperature > 0) and found.gap < GAP
            if prefixes == "handed_over":
                assert rollouts.prefilled_tokens == len(STARTS)


def test_checkpoints_that_vllm_knows_are_left_to_it(engine):
    """The plugin takes no class and no config of a family from vLLM or transformers."""
    assert "qwen3_5" in ModelRegistry.models["Qwen3_5ForCausalLM"].module_name
    assert type(AutoConfig.for_model("qwen3_5_text")) is Qwen3_5TextConfig
