"""A trunk shared by four ranks against one rank with all of it: outputs, states, losses and gradients, in float64."""

import itertools
import math
import random

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from refine_kernels.linear_head import IGNORE_INDEX
from refine_titan.models.attention import shares
from refine_titan.models.context_shard import ContextShard, gather_rows, rows_after
from refine_titan.models.decoder import FastWeightDecoder
from refine_titan.models.shared_prefix import SharedPrefixLayout, SnapshotBank, read_with_snapshots
from refine_titan.objective.losses import chosen_logprobs
from refine_titan.rollout.continuation import replay_prefixes, rescore_rollouts
from tests.helpers import relative_rms
from tests.unit_tests.models.test_shared_prefix import SMALL, VARIANTS, build

RANKS, TOKENS, LENGTH = 4, 160, 3  # 40 tokens a rank
EVEN = tuple(range(0, 161, 20))
# One document over all ranks, documents over two and three, borders at a shard's border and one token beside it, many short ones.
PACKINGS = [
    (0, 160),
    (0, 10, 90, 95, 130, 160),
    (0, 39, 160),
    (0, 40, 120, 160),
    (0, 41, 119, 121, 160),
    (0, 1, 80, 81, 82, 160),
    EVEN,
]
# Options whose states reach over borders in other ways than the default ones.
MODELS = [(family, {}) for family in SMALL] + [
    ("delta_net", VARIANTS["delta_net"][1]),
    ("delta_net", VARIANTS["delta_net"][3]),
    *((family, options) for family in VARIANTS for options in VARIANTS[family] if "attn" in options),
    ("qwen3_5", VARIANTS["qwen3_5"][0]),
    ("olmo_hybrid", VARIANTS["olmo_hybrid"][0]),
    ("gated_delta_net", VARIANTS["gated_delta_net"][1]),
    ("kda", VARIANTS["kda"][0]),
    ("lact", VARIANTS["lact"][1]),
    ("lact", VARIANTS["lact"][2] | {"window_size": 41}),
    ("lact", VARIANTS["lact"][3]),
    ("lact", {"chunk_size": 7, "window_size": 9}),
    ("lact", {"chunk_size": 500}),
]


def branches(cu_seqlens: tuple[int, ...]) -> list[int]:
    """Starts of branches at the first and last tokens of every shard and at one inside, some of them equal."""
    length = TOKENS // RANKS
    return [r for first in range(0, TOKENS, length) for r in (first + 1, first + 2, first + length, first + length // 2, first + length)]


def loss_of(model: FastWeightDecoder, shard: ContextShard, tokens, labels, starts, rollouts, weights) -> tuple[torch.Tensor, dict]:
    """Both forms of a ReFINE forward over the shard's tokens, summed; and what they compute for all of these tokens."""
    own = [i for i, start in enumerate(starts) if shard.owns(start)]
    own_starts = [starts[i] for i in own]
    local = [start - shard.begin for start in own_starts]
    stream = torch.cat([tokens[shard.tokens], rollouts[own].flatten()])
    layout = SharedPrefixLayout(shard.local_cu_seqlens, tuple(local), LENGTH, shard=shard)
    flat = model(stream, layout, labels=labels[shard.tokens], entropy=True, logit_rows=layout.predicting_rows())

    stride = model.model_args.snapshot_stride(16)
    trunk, bank = read_with_snapshots(model, tokens, shard, stride)
    prefix = replay_prefixes(model, bank, tokens, own_starts)
    replayed = rescore_rollouts(model, prefix, rollouts[own])

    logprobs = chosen_logprobs(flat.logits, rollouts[own], 1.0), chosen_logprobs(replayed.logits_nkV, rollouts[own], 1.0)
    loss = flat.losses.nll_sum + (flat.hidden_TD[: shard.num_tokens] * weights[shard.tokens]).sum()
    loss = loss + (trunk.hidden_TD * weights[shard.tokens]).sum() + logprobs[0].sum() + 0.5 * logprobs[1].sum()
    found = {"hidden": trunk.hidden_TD, "entropy": flat.losses.entropy_T, "flat": logprobs[0], "replayed": logprobs[1]}
    return loss, {name: x.detach() for name, x in found.items()}


def check(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    group = dist.group.WORLD
    for family, options in MODELS:
        model = build(family, **options)
        # These sequences are too short for moves that save time.
        for costs, (number, cu_seqlens) in itertools.product(
            (math.inf, 0) if model.model_args.has_attention else (math.inf,), enumerate(PACKINGS[:2] if options else PACKINGS)
        ):
            shares.KEYS_PER_MOVED_TOKEN = costs
            shares.attention_shares.cache_clear()
            assert (shares.attention_shares(cu_seqlens, RANKS) is None) == (costs > 0 or cu_seqlens == EVEN)
            where = (family, options, cu_seqlens, costs)
            generator = torch.Generator().manual_seed(number)
            tokens, rollouts = (torch.randint(13, shape, generator=generator) for shape in ((TOKENS,), (5 * RANKS, LENGTH)))
            labels = tokens.roll(-1)
            labels[torch.tensor(cu_seqlens[1:]) - 1] = IGNORE_INDEX
            weights = torch.randn(TOKENS, 16, generator=generator, dtype=torch.float64)
            starts = branches(cu_seqlens)
            random.Random(number).shuffle(starts)

            arguments = (tokens, labels, starts, rollouts, weights)
            _, expected = whole = loss_of(model, ContextShard.of_rank(cu_seqlens, None), *arguments)
            expected_gradients = torch.autograd.grad(whole[0], list(model.parameters()), allow_unused=True)
            shard = ContextShard.of_rank(cu_seqlens, group)
            loss, found = loss_of(model, shard, *arguments)
            gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

            own = [i for i, start in enumerate(starts) if shard.owns(start)]
            for name in ("hidden", "entropy"):
                assert relative_rms(found[name], expected[name][shard.tokens]) < 1e-9, (*where, name)
            for name in ("flat", "replayed"):
                assert relative_rms(found[name], expected[name][own]) < 1e-9, (*where, name)
            assert torch.equal(gather_rows(tokens[shard.tokens], shard), tokens)
            after = rows_after(tokens[shard.tokens][:2], shard)
            assert torch.equal(after, tokens[shard.end : shard.end + 2] if rank < RANKS - 1 else torch.zeros_like(after))
            for (name, p), gradient, wanted in zip(model.named_parameters(), gradients, expected_gradients):
                gradient = torch.zeros_like(p) if gradient is None else gradient.contiguous()
                dist.all_reduce(gradient)
                wanted = torch.zeros_like(p) if wanted is None else wanted
                assert relative_rms(gradient, wanted) < 1e-8, (*where, name)
    dist.destroy_process_group()


@pytest.mark.slow
def test_shards_of_four_ranks_are_the_whole_trunk(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    mp.start_processes(check, args=(str(tmp_path / "store"),), nprocs=RANKS, start_method="spawn")


@pytest.mark.parametrize("cu_seqlens", PACKINGS)
def test_shards_cover_documents_boundaries_and_branches_once(cu_seqlens):
    whole = ContextShard(cu_seqlens, 0, TOKENS)
    shards = [ContextShard(cu_seqlens, first, first + 40) for first in range(0, TOKENS, 40)]
    for shard, following in zip(shards, shards[1:]):
        assert shard.continues == (following.seen > 0)
    for shard in shards:
        documents = {start for start in cu_seqlens[:-1] if shard.begin <= start < shard.end} | {shard.begin}
        assert {shard.begin + start for start in shard.local_cu_seqlens[:-1]} == documents
        assert shard.local_cu_seqlens[-1] == 40
    arrivals = {shard.begin for shard in shards if shard.seen}
    together = [r for shard in shards for r in SnapshotBank.boundaries(shard, 16)]
    assert together == sorted(arrivals | set(SnapshotBank.boundaries(whole, 16)))
    for start in range(1, TOKENS + 1):
        assert sum(shard.owns(start) for shard in shards) == 1


def test_all_ranks_of_a_group_meet_before_some_of_them_exchange_rows(monkeypatch):
    """NCCL does not connect a group in an exchange that leaves ranks out."""
    operations = []

    def spy(name: str):
        function = getattr(dist, name)
        monkeypatch.setattr(dist, name, lambda *args, **kwargs: (operations.append(name), function(*args, **kwargs))[1])

    for name in ("all_reduce", "batch_isend_irecv"):
        spy(name)
    dist.init_process_group("fake", rank=0, world_size=RANKS)
    try:
        for group in (dist.group.WORLD, dist.new_group(range(RANKS))):
            shard = ContextShard.of_rank((0, TOKENS), group)
            operations.clear()
            rows_after(torch.ones(3), shard)
            rows_after(torch.ones(3), shard)
            assert operations == ["all_reduce", "batch_isend_irecv", "batch_isend_irecv"]
    finally:
        dist.destroy_process_group()
