"""The vLLM engine against the trainer: real vLLM, no mock. Legend: n rollouts, k tokens."""

import gc
import random
from contextlib import ExitStack, closing
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="needs the extra cpu or gpu")

from refine_titan.distributed.device import release_free_memory, resident_bytes
from refine_titan.models import FAMILIES
from refine_titan.models.context_shard import ContextShard
from refine_titan.models.shared_prefix import SharedPrefixLayout, read_with_snapshots
from refine_titan.rollout import vllm_runtime
from refine_titan.rollout.completion import CompletionRequest
from refine_titan.rollout.continuation import replay_prefixes
from refine_titan.rollout.engine import EngineError
from refine_titan.rollout.page_pool import PagePool
from refine_titan.rollout.paged_steps import has_recorded_steps
from tests.integration_tests.vllm_engines import LONGEST, build_engine, compare, random_model, rollout_request, single_rank, small_args
from tests.recorded_operators import record_operators

# Both float32; they differ in how rows are grouped.
GAP = 1e-4
# The debug LaCT's chunk is 256 tokens, its window 128; states are shared every 16 tokens.
STARTS = (1, 2, 15, 16, 17, 127, 128, 129, 254, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 2500, LONGEST)


@pytest.fixture(scope="module", autouse=True)
def process_group():
    with single_rank():
        yield


# test_vllm_hybrids.py has the gated rule.
@pytest.fixture(scope="module", params=[pytest.param(f, marks=() if f in ("delta_net", "lact") else pytest.mark.slow) for f in FAMILIES])
def model(request):
    return random_model(small_args(request.param))


@pytest.fixture(scope="module")
def engine(model):
    with closing(build_engine(model)) as engine:
        yield engine


@pytest.fixture
def extra_engine(model):
    """Builds engines that end with the test."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(closing(build_engine(model, **settings)))


def page_tokens(model) -> int:
    """Tokens of a page of attention, to which states are kept at the earliest; 0 in a model without."""
    return PagePool.of(model.model_args, torch.float32, least_tokens=16).block_tokens


def tokens(count: int = LONGEST, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))


def test_greedy_rollouts_are_the_trainers(model, engine):
    """Twenty prefixes of 1 to 4096 tokens, four at once, read in steps of 1024 tokens; then again, from cached states."""
    wanted = rollout_request(tokens(), STARTS)
    for _ in range(2):
        rollouts = engine.generate(wanted, None)
        found = compare(model, wanted, rollouts)
        assert found.greedy and found.gap < GAP
        assert rollouts.tokens_nk.shape == (20, 5) and rollouts.engine == "vllm" and rollouts.weight_version == 0
        assert rollouts.prefilled_tokens < 1.15 * LONGEST + len(STARTS) * page_tokens(model)


def test_prefixes_are_read_anew_without_caching(model, extra_engine):
    engine = extra_engine(prefixes="recomputed")
    wanted = rollout_request(tokens(), STARTS[:16])
    rollouts = engine.generate(wanted, None)
    found = compare(model, wanted, rollouts)
    assert found.greedy and found.gap < GAP
    assert rollouts.prefilled_tokens == sum(STARTS[:16])


def test_prefix_is_its_own_documents_tokens(model, engine):
    cu_seqlens = (0, 700, 701, 2000)
    wanted = rollout_request(tokens(2000, seed=1), (1, 700, 701, 702, 1500, 2000), cu_seqlens)
    found = compare(model, wanted, engine.generate(wanted, None))
    assert found.greedy and found.gap < GAP


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_rollouts_repeat_by_seed_whatever_else_is_in_the_batch(model, engine, temperature):
    starts = (40, 40, 40, 300, 301, 999)
    wanted = rollout_request(tokens(seed=2), starts, length=8, temperature=temperature)
    first = engine.generate(wanted, None)
    assert compare(model, wanted, first).gap < GAP
    assert len({tuple(row) for row in first.tokens_nk[:3].tolist()}) == 3  # three seeds at one position
    assert torch.equal(engine.generate(wanted, None).tokens_nk, first.tokens_nk)
    alone = replace(wanted, starts=starts[4:5], seeds=wanted.seeds[4:5])
    assert torch.equal(engine.generate(alone, None).tokens_nk, first.tokens_nk[4:5])
    other = rollout_request(tokens(seed=2), starts, length=8, temperature=temperature, seed=1)
    assert not torch.equal(engine.generate(other, None).tokens_nk, first.tokens_nk)


def test_four_sequences_of_eight_prefixes_are_read_about_once(model, engine):
    """Must show: at most 1.15 times the sum of the longest prefixes, and what follows the last full page before each."""
    generator = torch.Generator().manual_seed(3)
    cu_seqlens = tuple(range(0, 5 * LONGEST, LONGEST))
    starts = [begin + 512 * c + int(torch.randint(20, 493, (), generator=generator)) for begin in cu_seqlens[:4] for c in range(8)]
    engine.sync_weights(0)  # forgets what other tests have read
    rollouts = engine.generate(rollout_request(tokens(4 * LONGEST, seed=4), starts, cu_seqlens), None)
    longest = sum(max(s for s in starts if begin < s <= begin + LONGEST) - begin for begin in cu_seqlens[:4])
    assert longest <= rollouts.prefilled_tokens <= 1.15 * longest + len(starts) * page_tokens(model)


def test_handed_over_states_are_decoded_without_reading_a_prefix(model, extra_engine):
    engine = extra_engine(prefixes="handed_over")
    stream, starts = tokens(), (2, 16, 17, 128, 129, 255, 256, 257, 512, 1025, 2500, LONGEST)
    whole = ContextShard.of_rank((0, LONGEST), None)
    with torch.no_grad():
        _, bank = read_with_snapshots(model, stream, whole, 64)
        prefix = replay_prefixes(model, bank, stream, starts)
    for temperature in (0.0, 1.0):
        wanted = rollout_request(stream, starts, temperature=temperature)
        rollouts = engine.generate(wanted, prefix)
        found = compare(model, wanted, rollouts)
        assert (found.greedy or temperature > 0) and found.gap < GAP
        assert rollouts.prefilled_tokens == len(starts)  # the last token of each


def test_recorded_decoding_steps_give_the_same_rollouts(model, extra_engine):
    """Recorded as a CUDA graph is, three sequences filled up to four; pages hold NaN until they are written."""
    if not has_recorded_steps(model):
        pytest.skip("this family's steps need more than pages hold")
    engine, recordings = extra_engine(), []
    served = vllm_runtime.engine_model(engine._llm)
    for pages in served.pages:
        pages.fill(torch.nan)
    served.steps.record(lambda function: recordings.append(1) or record_operators(function))
    wanted = rollout_request(tokens(), (40, 300, 999), length=8)
    for _ in range(2):
        found = compare(model, wanted, engine.generate(wanted, None))
        assert found.greedy and found.gap < GAP
    assert len(recordings) == 1


def test_bfloat16_engine_of_a_float32_trainer_stays_near(model, extra_engine):
    engine = extra_engine(dtype=torch.bfloat16)
    wanted = rollout_request(tokens(seed=5), (100, 300, 2000), temperature=1.0)
    # bfloat16 keeps 8 bits: log-probabilities of about -5.7 move by hundredths; LaCT's orthogonalised updates add to that
    gap = compare(model, wanted, engine.generate(wanted, None)).gap
    assert 1e-6 < gap < 0.25
    assert not engine.weights.shares_storage and engine.weights.bytes_copied > 0


def test_weights_follow_the_trainer_and_stale_ones_are_refused(model, engine):
    wanted = rollout_request(tokens(seed=6), (100, 600, 1200))
    engine.sync_weights(0)
    before, checksum = engine.generate(wanted, None), engine.weights.checksum
    assert engine.weights.shares_storage and engine.weights.bytes_copied == 0
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7)))
    try:
        with pytest.raises(EngineError, match="holds weights version 0, wanted is version 1"):
            engine.generate(replace(wanted, weight_version=1), None)
        engine.sync_weights(1)
        assert engine.weights.version == 1 and engine.weights.checksum != checksum
        after = engine.generate(replace(wanted, weight_version=1), None)
        # Had cached states of the old weights been taken up, this gap would be about a nat.
        assert compare(model, wanted, after).gap < GAP
        assert (after.logprobs_nk - before.logprobs_nk).abs().max() > 0.01
    finally:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(original[name])
        engine.sync_weights(0)
    assert engine.weights.checksum == checksum


def test_trainers_random_state_is_untouched(engine):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    engine.generate(rollout_request(tokens(), (50, 60), temperature=1.0), None)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


def test_trainer_can_differentiate_after_the_engine_ran_the_same_shapes(model, engine):
    """Operators keep index tensors between calls; those that the engine made must serve a backward."""
    stream = tokens(688, seed=8)
    # Of 700 tokens the engine reads 688, a multiple of its 16-token blocks, in one step; no other test does.
    engine.generate(rollout_request(tokens(700, seed=8), (700,)), None)
    out = model(stream, SharedPrefixLayout((0, 688), state_positions=(688,)), labels=stream.roll(-1))
    out.losses.nll_sum.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad(set_to_none=True)


def decode(token_ids) -> str:
    return bytes(token for token in token_ids if token < 256).decode("latin-1")


def test_completions_are_long_greedy_and_end_at_stops(model, engine):
    prompts = tuple(tuple(tokens(seed=9)[:length].tolist()) for length in (1, 30, 300, 700, 900, 1100))
    wanted = CompletionRequest(prompts, max_tokens=(60,) * 6, seeds=(0,) * 6)
    plain = engine.complete(wanted, decode)
    for prompt, completion in zip(prompts, plain):
        stream = torch.tensor([*prompt, *completion.tokens])
        with torch.no_grad():
            rows = torch.arange(len(prompt) - 1, len(stream) - 1)
            expected = model(stream, SharedPrefixLayout((0, len(stream))), logit_rows=rows).logits.argmax(-1)
        assert completion.tokens == tuple(expected.tolist()) and completion.finish_reason == "length"
        assert len(completion.tokens) == 60 and completion.text == decode(completion.tokens)
    stop = decode(plain[2].tokens[10:13])
    cut = engine.complete(replace(wanted, stop_strings=("never seen here", stop)), decode)
    for whole, short in zip(plain, cut):
        end = whole.text.find(stop)
        assert short.text == (whole.text[:end] if end >= 0 else whole.text)
        assert short.finish_reason == ("stop" if end >= 0 else "length")
        assert whole.tokens[: len(short.tokens)] == short.tokens
    assert len(cut[2].tokens) <= 13
    ends = (plain[2].tokens[5], plain[3].tokens[7])  # some models have several
    for whole, ended in zip(plain, engine.complete(replace(wanted, stop_tokens=ends), decode)):
        end = next((i for i, token in enumerate(whole.tokens) if token in ends), None)
        assert ended.tokens == whole.tokens[:end] and ended.finish_reason == ("length" if end is None else "stop")
    with pytest.raises(EngineError, match="prompt 1 has 4000 tokens and asks for up to 200 more; the engine was built for 4112"):
        engine.complete(CompletionRequest(((1,), tuple(tokens()[:4000].tolist())), (5, 200), (0, 0)), decode)


def test_failure_inside_vllm_names_engine_and_weights_and_leaves_nothing_running(model, engine):
    wanted = rollout_request(tokens(), (50, 300))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.layers["0"].mixer.__class__, "finish", raise_runtime_error)
        with pytest.raises(EngineError, match=r"failed in generate \(weights version 0\): RuntimeError: no device") as caught:
            engine.generate(wanted, None)
    assert isinstance(caught.value.__cause__, RuntimeError)
    # Its cache holds states that were never computed.
    with pytest.raises(EngineError, match="weights cannot be used: the last round failed"):
        engine.generate(wanted, None)
    engine.sync_weights(0)
    found = compare(model, wanted, engine.generate(wanted, None))
    assert found.greedy and found.gap < GAP


def raise_runtime_error(*_, **__):
    raise RuntimeError("no device")


def test_weights_and_pages_wake_in_order_after_sleep(model, extra_engine):
    """vLLM's CPU worker ignores sleep, but its scheduler does pause: requests wait for ever unless all parts are awake."""
    for dtype in (torch.float32, torch.bfloat16):
        engine = extra_engine(dtype=dtype)
        engine._sleeps = True  # off on a CPU
        wanted = rollout_request(tokens(), (50, 300))
        before = engine.generate(wanted, None)
        engine.sleep()
        if dtype == torch.bfloat16:
            assert engine.weight_version is None
            with pytest.raises(EngineError, match="gave the memory of its copies away in its sleep"):
                engine.generate(wanted, None)
            engine.sync_weights(0)
        assert torch.equal(engine.generate(wanted, None).tokens_nk, before.tokens_nk)
        engine.sleep()
        engine.sync_weights(0)
        prompt = CompletionRequest((tuple(tokens()[:50].tolist()),), (5,), (0,))
        assert engine.complete(prompt, decode)[0].tokens == tuple(before.tokens_nk[0].tolist())


def test_few_pages_and_few_tokens_a_step_cost_time_only(model, extra_engine):
    """The smallest cache that the settings allow: vLLM interrupts sequences, drops their states and reads them anew."""
    pool = PagePool.of(model.model_args, torch.float32, least_tokens=16)
    blocks = pool.state_blocks(3) + pool.own_blocks(LONGEST + 16, False) + 1
    engine = extra_engine(cache_bytes=blocks * pool.block_bytes, max_num_batched_tokens=max(64, pool.block_tokens))
    starts = (1, 33, 70, 71, 140, 200, 256, 257)
    wanted = rollout_request(tokens(), starts, length=24)
    found = compare(model, wanted, engine.generate(wanted, None))
    assert found.greedy and found.gap < GAP


def test_closed_engine_gives_its_memory_back(model):
    gc.collect()
    release_free_memory()
    before = resident_bytes()
    engine = build_engine(model, cache_bytes=2**29)
    engine.generate(rollout_request(tokens(), (300,)), None)
    for pages in vllm_runtime.engine_model(engine._llm).pages:
        pages.fill(1)  # memory becomes resident when it is written
    held = resident_bytes()
    assert held > before + 0.9 * 2**29
    engine.close()
    gc.collect()
    release_free_memory()
    assert resident_bytes() < before + 0.3 * 2**29
