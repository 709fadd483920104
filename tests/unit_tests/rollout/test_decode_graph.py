"""Recorded rounds of the native engine give what rounds give that run as they are written."""

import gc
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchtitan.distributed import ParallelDims

from refine_kernels.footprint import gpu_footprint
from refine_titan.distributed.parallelize import parallelize
from refine_titan.models import FAMILIES
from refine_titan.models.context_shard import ContextShard
from refine_titan.models.decoding import DecodingClock
from refine_titan.models.shared_prefix import SharedPrefixMixer, read_with_snapshots
from refine_titan.rollout import native
from refine_titan.rollout.continuation import replay_prefixes
from refine_titan.rollout.decode_graph import CudaGraphs, can_record
from refine_titan.rollout.engine import RolloutRequest
from refine_titan.rollout.native import NativeEngine
from refine_titan.validation import load_config
from tests.recorded_operators import record_operators
from tests.unit_tests.models.test_shared_prefix import DECODED, build

T, K = 200, 5
ONE_RANK = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
# Families whose decoding steps a CUDA graph can repeat.
# Attention refers to the pools of the pass that it goes on from, which are others in every round: its rounds are not recorded.
RECORDED = [
    name for name, family in FAMILIES.items() if family.mixer_class.step_can_be_recorded and not family.flavors["debug"].has_attention
]


class Everything:
    """Contains whatever is asked for: as if every size had come before."""

    def __contains__(self, key):
        return True


class Rounds:
    """Rounds of rollouts from one trunk, by an engine that records and by one that does not."""

    def __init__(self, model, cu_seqlens=(0, 80, T), temperature=1.0, record=record_operators, precision=nullcontext, records_at_once=True):
        self.model, self.cu_seqlens, self.temperature = model, cu_seqlens, temperature
        self._record, self.recordings = record, 0
        self.precision = precision
        self.plain, self.recorded = (NativeEngine(model, precision, record) for record in (None, self.record))
        if records_at_once:
            self.recorded._sizes = Everything()

    def record(self, function):
        self.recordings += 1
        return self._record(function)

    def forward(self, *args, **kwargs):
        with self.precision():
            return self.model(*args, **kwargs)

    def run(self, starts, version, k=K):
        """Tokens and log-probabilities by both."""
        tokens = torch.randint(0, 13, (T,), generator=torch.Generator().manual_seed(version)).to(self.model.output.weight.device)
        shard = ContextShard.of_rank(self.cu_seqlens, None)
        stride = self.model.model_args.snapshot_stride(16)
        with torch.no_grad():
            _, bank = read_with_snapshots(self.forward, tokens, shard, stride)
            prefix = replay_prefixes(self.forward, bank, tokens, starts)
        seeds = tuple(range(version, version + len(starts)))
        request = RolloutRequest(tokens, self.cu_seqlens, starts, seeds, k, self.temperature, version)
        found = []
        for engine in (self.plain, self.recorded):
            engine.sync_weights(version)
            found.append(engine.generate(request, prefix))
        return found


def assert_same_rollouts(found):
    plain, recorded = found
    assert torch.equal(plain.tokens_nk, recorded.tokens_nk)
    assert torch.equal(plain.logprobs_nk, recorded.logprobs_nk)


RECORDED_MODELS = [(family, options) for family, options in DECODED if not build(family, **options).model_args.has_attention]


def test_rounds_with_attention_are_not_recorded():
    rounds = Rounds(build("delta_net", attn={"layers": [1], "num_heads": 2}))
    for version in (0, 1):
        assert_same_rollouts(rounds.run((1, 40, 145), version))
    assert rounds.recordings == 0


@pytest.mark.parametrize("family, options", RECORDED_MODELS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_recorded_rounds_equal_plain_ones(family, options, temperature):
    """Other prefixes, tokens, draws and weights in every round; some of LaCT's chunks end inside."""
    model = build(family, **options)
    rounds = Rounds(model, temperature=temperature)
    kept = []
    for version, starts in enumerate([(1, 40, 63, 145), (2, 81, 81, 200), (17, 18, 19, 20), (64, 65, 130, 190)]):
        kept.append((rounds.run(starts, version), rounds))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(version)).to(parameter)
    for found, _ in kept:  # results of earlier rounds are not overwritten by later ones
        assert_same_rollouts(found)
    assert rounds.recordings == 1 or (family == "lact" and rounds.recordings == 0)
    assert len({tuple(found[1].tokens_nk.flatten().tolist()) for found, _ in kept}) == 4


@pytest.mark.parametrize("start, recordings", [(27, 1), (28, 1), (29, 0), (32, 0), (33, 1)])
def test_lact_runs_rounds_in_which_a_chunk_ends_as_they_are_written(start, recordings, monkeypatch):
    """5 rows are read, from row start - 1 on. Where the last of them ends a chunk of 32 nobody reads what it writes."""
    rounds = Rounds(build("lact", chunk_size=32, window_size=8))
    found = rounds.run((70, start), 0)
    assert_same_rollouts(found)
    assert rounds.recordings == recordings
    monkeypatch.setattr(native, "DecodingClock", lambda tokens_to_come: DecodingClock())  # sums up whatever a chunk writes
    assert torch.equal(rounds.run((70, start), 0)[0].logprobs_nk, found[0].logprobs_nk)


def test_rounds_of_other_sizes_and_moved_weights_are_recorded_anew():
    """A size is recorded when it comes for the second time; two graphs are kept."""
    model = build("delta_net")
    rounds = Rounds(model, records_at_once=False)
    two, three = (5, 90), (5, 90, 100)
    sizes = [(two, 3, 0), (two, 3, 1), ((7, 91), 3, 1), (three, 3, 1), (three, 3, 2), (two, 3, 2), (two, 4, 2), (two, 4, 3), (three, 3, 4)]
    for version, (starts, k, recordings) in enumerate(sizes):
        assert_same_rollouts(rounds.run(starts, version, k))
        assert rounds.recordings == recordings, (version, starts, k)
    weight = model.output.weight
    weight.data = 2 * weight.data
    for version, recordings in ((20, 4), (21, 5)):
        assert_same_rollouts(rounds.run(three, version, 3))
        assert rounds.recordings == recordings


def test_long_rounds_are_not_recorded(monkeypatch):
    monkeypatch.setattr(native, "MAX_LAYER_STEPS", 8)
    rounds = Rounds(build("delta_net"))  # of two layers
    for k, recordings in ((5, 0), (4, 1)):
        assert_same_rollouts(rounds.run((5, 90), 0, k))
        assert rounds.recordings == recordings


@pytest.mark.parametrize("start", [28, 29])
def test_engine_lets_go_of_the_pass_that_it_went_on_from(start):
    """LaCT's states refer to all rows and weights of a pass; after a round, recorded or with a chunk's end in it, nothing needs them."""
    model = build("lact", chunk_size=32, window_size=8)
    pools = []

    def watch(module, args, output):
        pools.extend(StorageWeakRef(x.pool.untyped_storage()) for x in output[1].values() if hasattr(x, "pool"))

    for block in model.layers.values():
        block.mixer.register_forward_hook(watch)
    rounds = Rounds(model)
    rounds.run((start, 70), 0)
    gc.collect()
    assert pools and all(pool.expired() for pool in pools)


def test_mixers_without_a_step_of_their_own_decode_by_mix(monkeypatch):
    """Which is not recorded: what `mix` plans may be forgotten."""
    assert not SharedPrefixMixer.step_can_be_recorded
    model = build("gated_delta_net")
    own = Rounds(model).run((5, 90), 0)[0]
    monkeypatch.setattr(type(model.layers["0"].mixer), "step", SharedPrefixMixer.step)
    found = Rounds(model).run((5, 90), 0)[0]
    assert torch.equal(found.tokens_nk, own.tokens_nk)
    torch.testing.assert_close(found.logprobs_nk, own.logprobs_nk)


class RefuseTransfers(TorchDispatchMode):
    """A tensor on the meta device cannot be read; with it as the accelerator, what mixes host and device is a transfer."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.dim() or operator._overloadpacket is torch.ops.aten._to_copy}
        assert len(devices) < 2, f"{operator} moves data between host and device"
        return result


def without_data(state):
    return type(state)({name: _moved(x, "meta") for name, x in state.tensors.items()})


def _moved(x, device):
    if isinstance(x, torch.Tensor):
        return x if x.dtype == torch.long else x.to(device)  # integers of states are the host's
    if hasattr(x, "pool"):
        return x._replace(pool=x.pool.to(device))
    return x._replace(values=tuple(value.to(device) for value in x.values))


@pytest.mark.parametrize("family", RECORDED)
def test_what_is_recorded_moves_nothing_between_host_and_device(family, monkeypatch):
    """A GPU refuses to record that, and waits for it where it does not record."""
    model = build(family, **({"chunk_size": 64, "window_size": 16} if family == "lact" else {})).float()
    starts, recordings = (1, 40, 60, 145), []
    shard = ContextShard.of_rank((0, T), None)
    stride = model.model_args.snapshot_stride(16)
    tokens = torch.randint(0, 13, (T,))
    with torch.no_grad():
        _, bank = read_with_snapshots(model, tokens, shard, stride)
        prefix = replay_prefixes(model, bank, tokens, starts)
    prefix = type(prefix)(prefix.last_tokens_n.to("meta"), [without_data(layer) for layer in prefix.layers])
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device, **arguments: autocast("cpu", **arguments))

    def record(function):
        function()
        with RefuseTransfers():
            function()
        recordings.append(function)
        return function

    engine = NativeEngine(model.to("meta"), record=record)
    engine._sizes = Everything()
    engine.sync_weights(0)
    with gpu_footprint():
        rollouts = engine.generate(RolloutRequest(tokens, (0, T), starts, (0,) * 4, 3, 1.0, 0), prefix)
    assert len(recordings) == 1 and rollouts.tokens_nk.device.type == "meta"
    with pytest.raises(AssertionError, match="between host and device"), RefuseTransfers():
        torch.arange(3).to("meta")


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("family", ["delta_net", "lact"])
def test_checkpointed_blocks_are_recorded_without_random_states(family, mode, monkeypatch):
    """torch.utils.checkpoint reads them without gradient too, if it is let: for nothing, and not every torch records that."""
    config = load_config([f"--activation_checkpoint.mode={mode}"])
    model = parallelize(build(family), ONE_RANK, config)
    rounds = Rounds(model)

    def record(function):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "get_rng_state", lambda: pytest.fail("the random state was read"))
            return record_operators(function)

    rounds._record = record
    for version in range(2):
        assert_same_rollouts(rounds.run((5, 20), version))
    assert rounds.recordings == 1


def test_weights_on_a_cpu_are_not_recorded():
    assert not can_record(build("delta_net"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("is_production", [False, True])
@pytest.mark.parametrize("family", RECORDED)
def test_cuda_graphs_give_the_same_rollouts(family, is_production):
    """Also in bfloat16 by autocast, with checkpointed blocks and padded rows."""
    model, precision = build(family).float(), nullcontext
    if is_production:
        model = parallelize(model, ONE_RANK, load_config(["--activation_checkpoint.mode=full"]))
        model.stream_multiple = 16
        precision = partial(torch.autocast, "cuda", dtype=torch.bfloat16)
    model.cuda()
    assert can_record(model)
    rounds = Rounds(model, record=CudaGraphs().record, precision=precision)
    for version, starts in enumerate([(5, 40, 100, 190), (6, 20), (7, 70, 110, 150), (8, 21)]):
        assert_same_rollouts(rounds.run(starts, version))
    assert rounds.recordings == 2
