"""Real vLLM engines around small models, and the trainer's own view of what they sample."""

from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist

from refine_titan.models import FAMILIES, build_decoder
from refine_titan.models.decoder import DecoderArgs, FastWeightDecoder
from refine_titan.models.shared_prefix import SharedPrefixLayout
from refine_titan.objective.losses import chosen_logprobs
from refine_titan.rollout.engine import RolloutRequest, Rollouts
from refine_titan.rollout.page_pool import PagePool
from refine_titan.rollout.vllm_engine import VLLMEngine, VLLMSettings
from refine_titan.rollout.vllm_settings import config_json, unwritten_args
from refine_titan.seeding import derive_seed

LONGEST = 4096


def small_args(family: str) -> DecoderArgs:
    """The family's debug model, cut to two layers unless it has attention; float32 throughout."""
    args = FAMILIES[family].flavors["debug"]
    args = replace(args, **({} if args.has_attention else {"n_layers": 2}))
    args.compute_in_float32()
    return args


def random_model(args: DecoderArgs, seed: int = 0) -> FastWeightDecoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_decoder(args)
        model.init_weights()
    return model


def build_engine(model: FastWeightDecoder, **settings) -> VLLMEngine:
    """An engine with room for four sequences."""
    values = (
        dict(
            dtype=torch.float32,
            max_model_len=LONGEST + 16,
            max_num_seqs=4,
            max_num_batched_tokens=1024,
            prefixes="cached",
            block_tokens=16,
            cache_bytes=0,
        )
        | settings
    )
    args = model.model_args
    pool = PagePool.of(args, values["dtype"], least_tokens=values["block_tokens"])
    values["block_tokens"] = pool.block_tokens or values["block_tokens"]
    if not values["cache_bytes"]:
        sequences = values["max_num_seqs"] + 1
        blocks = pool.state_blocks(3 * sequences) + sequences * pool.own_blocks(values["max_model_len"], False)
        values["cache_bytes"] = pool.block_bytes * blocks
    engine = VLLMEngine(model, config_json(args), unwritten_args(args), VLLMSettings(**values), torch.device("cpu"))
    engine.sync_weights(0)
    return engine


def rollout_request(tokens_T, starts, cu_seqlens=None, *, length=5, temperature=0.0, version=0, seed=0) -> RolloutRequest:
    seeds = tuple(derive_seed(seed, "rollout", i) for i in range(len(starts)))
    return RolloutRequest(tokens_T, cu_seqlens or (0, len(tokens_T)), tuple(starts), seeds, length, temperature, version)


@torch.no_grad()
def trainer_logits(model: FastWeightDecoder, wanted: RolloutRequest, rollouts: Rollouts) -> torch.Tensor:
    """Logits `[n, k, V]` that each rollout token is drawn from, by one pass over every prefix and rollout: no state is reused."""
    logits = []
    for start, tokens_k in zip(wanted.starts, rollouts.tokens_nk):
        begin = max(b for b in wanted.cu_seqlens if b < start)
        stream = torch.cat([wanted.tokens_T[begin:start], tokens_k])
        rows = torch.arange(start - begin - 1, len(stream) - 1)
        logits.append(model(stream, SharedPrefixLayout((0, len(stream))), logit_rows=rows).logits)
    return torch.stack(logits)


@dataclass
class Comparison:
    """Engine against trainer: `greedy` whether every token is the trainer's most likely one, `gap` in nats."""

    greedy: bool
    gap: float


def compare(model: FastWeightDecoder, wanted: RolloutRequest, rollouts: Rollouts) -> Comparison:
    logits = trainer_logits(model, wanted, rollouts)
    logprobs = chosen_logprobs(logits, rollouts.tokens_nk, wanted.temperature)
    return Comparison(torch.equal(logits.argmax(-1), rollouts.tokens_nk), float((logprobs - rollouts.logprobs_nk).abs().max()))


@contextmanager
def single_rank():
    """A process group of this process alone, as a run has; engines join it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
            patch.setenv(name, value)
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        try:
            yield
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
