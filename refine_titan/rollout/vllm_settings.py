"""The vLLM engine behind the door of `build.py`: its settings, its memory, and how it is built for a run. Nothing here imports vLLM."""

import importlib.util
import json
import math
from dataclasses import fields, replace
from typing import Any

import torch

from refine_titan.config.batch_plan import least_microbatches_per_round
from refine_titan.config.sections import JobConfig
from refine_titan.distributed.device import free_memory_bytes
from refine_titan.errors import UserError
from refine_titan.models.decoder import DecoderArgs, FastWeightDecoder
from refine_titan.rollout.byte_sizes import GIB, readable_size
from refine_titan.rollout.engine_host import EngineHost, EngineMemory
from refine_titan.rollout.page_pool import BLOCKS_OF_VLLM, PagePool, obstacle
from refine_titan.rollout.paged_steps import has_recorded_steps, recorded_size
from refine_titan.rollout.vllm_engine import VLLMEngine, VLLMSettings

# Settings of `[rollout]` that only this engine reads.
OWN_SETTINGS = ("dtype", "max_num_seqs", "max_num_batched_tokens", "prefixes", "block_tokens", "cache_gib", "sleep")
# States of a running sequence. With caching: the state that it continues from, and the state that it writes; where it has read its prefix
# itself, also a state that other sequences can continue from.
STATES_READ, STATES_GIVEN, STATES_ALONE = 3, 2, 1


def check(config: JobConfig, args: DecoderArgs) -> None:
    """Checks that a run's engine can be built.

    Raises:
        UserError: naming the setting, the value found and what is allowed.
    """
    rollout = config.rollout
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "rollout.engine is 'vllm', but vllm is not installed; allowed without it: 'native'. It comes with the extra 'gpu' "
            "or, on a machine without a GPU, 'cpu': pip install -e '.[gpu]'"
        )
    if hindrance := obstacle(args):
        raise UserError(f"rollout.engine is 'vllm', but the model has {hindrance}, which does not run there; allowed: 'native'")
    pool = page_pool(config, args)
    step = max(rollout.block_tokens, pool.block_tokens if _caches(config, args) else 0)
    if rollout.max_num_batched_tokens < max(rollout.max_num_seqs, step):
        tokens = f"rollout.block_tokens ({step})" if step == rollout.block_tokens else f"the tokens of a page of this model ({step})"
        raise UserError(
            f"rollout.max_num_batched_tokens is {rollout.max_num_batched_tokens}; allowed: at least rollout.max_num_seqs "
            f"({rollout.max_num_seqs}) and {tokens}"
        )
    cache = cache_bytes(config, args, microbatches_per_round=1)
    blocks = _least_blocks(config, args, pool)
    needed = pool.block_bytes * blocks
    if cache < needed:
        kind = "block" if pool.attention_groups else "state"
        least = math.ceil(needed / GIB * 1000) / 1000
        raise UserError(
            f"rollout.cache_gib is {rollout.cache_gib:g}, which holds {cache // pool.block_bytes} {kind}(s) of "
            f"{readable_size(pool.block_bytes)} each; one rollout needs {blocks}: allowed: at least {least:g}, or 0 for what a round needs"
        )


def count_memory(config: JobConfig, model: FastWeightDecoder, num_ranks: int, gpu: bool) -> EngineMemory:
    """Counts copies of weights that cannot share the trainer's storage, the pages, and what recorded steps keep."""
    engine, master, tensor = engine_dtype(config), getattr(torch, config.training.dtype), config.parallelism.tensor_parallel_degree
    is_shared = num_ranks == tensor and engine == master
    weights = 0 if is_shared else sum(p.numel() for p in model.parameters()) * engine.itemsize // tensor
    args, microbatches = model.model_args, least_microbatches_per_round(config, num_ranks)
    states = cache_bytes(config, args, microbatches)
    if gpu and config.rollout.cuda_graph and has_recorded_steps(model):
        # A recorded step keeps memory for one layer's states of its sequences.
        states += recorded_size(_running_sequences(config, microbatches)) * page_pool(config, args).page_bytes
    return EngineMemory(weights, states)


def gives_memory_back(config: JobConfig, gpu: bool) -> bool:
    """Whether the update can use the engine's memory, because the engine sleeps meanwhile."""
    return gpu and config.rollout.sleep


def changes_that_save_memory(config: JobConfig, num_ranks: int, gpu: bool) -> list[dict[str, object]]:
    """Returns settings with which the engine needs less: there are none that leave its rounds as fast."""
    return []


def build_rollout_engine(config: JobConfig, host: EngineHost) -> VLLMEngine:
    """Builds the engine of a run; it shares the weights of the trainer's model where it can.

    Raises:
        UserError: if its states do not fit into what is free.
    """
    return _build(host, engine_settings(config, host.model.model_args, host.microbatches_per_round))


def build_completion_engine(config: JobConfig, host: EngineHost, *, width: int, max_tokens: int) -> VLLMEngine:
    """Builds an engine for long outputs, with the weights that the model has now.

    Raises:
        UserError: if its states do not fit into what is free.
    """
    args = host.model.model_args
    config = replace(config, rollout=replace(config.rollout, engine="vllm", prefixes="recomputed", max_num_seqs=width))
    check(config, args)
    settings = replace(
        engine_settings(config, args, microbatches_per_round=1),
        max_model_len=max_tokens,
        cache_bytes=_bytes_of_answers(config, args, width, max_tokens),
        sleep=False,
    )
    engine = _build(host, settings)
    engine.sync_weights(0)
    return engine


def build_both_engines(config: JobConfig, host: EngineHost, *, width: int, max_tokens: int) -> tuple[VLLMEngine, VLLMEngine]:
    """Builds one engine, for rollouts and for answers.

    Raises:
        UserError: if its states do not fit into what is free.
    """
    args = host.model.model_args
    check(config, args)
    settings = engine_settings(config, args, host.microbatches_per_round)
    num_seqs, max_tokens = max(settings.max_num_seqs, width), max_tokens + config.refine.rollout_length
    settings = replace(
        settings,
        max_model_len=max_tokens,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=max(settings.max_num_batched_tokens, num_seqs),
        cache_bytes=max(settings.cache_bytes, _bytes_of_answers(config, args, num_seqs, max_tokens)),
    )
    engine = _build(host, settings)
    return engine, engine


def _build(host: EngineHost, settings: VLLMSettings) -> VLLMEngine:
    free = torch.cuda.mem_get_info(host.device)[0] if host.device.type == "cuda" else free_memory_bytes()
    if settings.cache_bytes > free:
        raise UserError(
            f"the vLLM engine's states take {readable_size(settings.cache_bytes)}, but beside the model {readable_size(free)} are free; "
            "lower rollout.cache_gib or, where it is 0, rollout.max_num_seqs (evaluation.batch_size in an evaluation)"
        )
    args = host.model.model_args
    return VLLMEngine(host.model, config_json(args), unwritten_args(args), settings, host.device, host.replicas, host.tensor_parallel_mesh)


def config_json(args: DecoderArgs) -> bytes:
    """Returns the model's `config.json`."""
    return json.dumps(args.to_hf_config()).encode()


def unwritten_args(args: DecoderArgs) -> dict[str, Any]:
    """Returns the fields of the model's args that its `config.json` does not have."""
    return {f.name: getattr(args, f.name) for f in fields(args) if f.name not in args.hf_format.all_keys}


def engine_settings(config: JobConfig, args: DecoderArgs, microbatches_per_round: int) -> VLLMSettings:
    """Returns the settings of a run's engine."""
    rollout, refine, training = config.rollout, config.refine, config.training
    return VLLMSettings(
        dtype=engine_dtype(config),
        max_model_len=training.seq_len + refine.rollout_length,
        max_num_seqs=rollout.max_num_seqs,
        max_num_batched_tokens=rollout.max_num_batched_tokens,
        prefixes=rollout.prefixes,
        block_tokens=page_pool(config, args).block_tokens or (rollout.block_tokens if _caches(config, args) else None),
        cache_bytes=cache_bytes(config, args, microbatches_per_round),
        sleep=rollout.sleep,
        cuda_graph=rollout.cuda_graph,
    )


def engine_dtype(config: JobConfig) -> torch.dtype:
    """Returns the dtype of the engine's weights and arithmetic."""
    name = config.rollout.dtype
    return getattr(torch, config.training.mixed_precision_param if name == "auto" else name)


def page_pool(config: JobConfig, args: DecoderArgs) -> PagePool:
    """Returns the sizes of the engine's pages, on one of the ranks that share the model's heads."""
    least = config.rollout.block_tokens if config.rollout.prefixes == "cached" else 1
    return PagePool.of(args, engine_dtype(config), config.parallelism.tensor_parallel_degree, least)


def cache_bytes(config: JobConfig, args: DecoderArgs, microbatches_per_round: int) -> int:
    """Returns the bytes of memory for the engine's pages: as configured, or what a round needs."""
    rollout, training, pool = config.rollout, config.training, page_pool(config, args)
    if rollout.cache_gib > 0:
        return int(rollout.cache_gib * GIB)
    running, sequences = _running_sequences(config, microbatches_per_round), training.local_batch_size * microbatches_per_round
    # With caching the last prefix of every sequence is kept, because the next one continues from it.
    kept = sequences if rollout.prefixes == "cached" else 0
    blocks = pool.state_blocks(_states(config, args) * running + kept)
    if _caches(config, args):
        # Rollouts share full blocks with the others of their sequence.
        blocks += sequences * pool.shared_blocks(training.seq_len) + running * pool.own_blocks(config.refine.rollout_length, True)
    else:
        blocks += running * pool.own_blocks(training.seq_len + config.refine.rollout_length, False)
    return pool.block_bytes * (blocks + BLOCKS_OF_VLLM)


def _least_blocks(config: JobConfig, args: DecoderArgs, pool: PagePool) -> int:
    """Returns the blocks of one rollout of the longest prefix."""
    longest = config.training.seq_len + config.refine.rollout_length
    return pool.state_blocks(_states(config, args)) + pool.own_blocks(longest, False) + BLOCKS_OF_VLLM


def _bytes_of_answers(config: JobConfig, args: DecoderArgs, width: int, max_tokens: int) -> int:
    """Returns the bytes of `width` answers at once, none of which shares anything with another."""
    pool = page_pool(config, args)
    blocks = pool.state_blocks(_states(config, args)) + pool.own_blocks(max_tokens, False)
    return pool.block_bytes * (width * blocks + BLOCKS_OF_VLLM)


def _caches(config: JobConfig, args: DecoderArgs) -> bool:
    """Whether the engine keeps what other sequences may continue from: states, or keys and values that are handed over, too."""
    return config.rollout.prefixes == "cached" or (config.rollout.prefixes == "handed_over" and args.has_attention)


def _states(config: JobConfig, args: DecoderArgs) -> int:
    """Returns the states of a running sequence."""
    if not _caches(config, args):
        return STATES_ALONE
    return STATES_READ if config.rollout.prefixes == "cached" else STATES_GIVEN


def _running_sequences(config: JobConfig, microbatches_per_round: int) -> int:
    """Returns how many sequences the engine runs at once."""
    refine, sequences = config.refine, config.training.local_batch_size * microbatches_per_round
    return min(config.rollout.max_num_seqs, sequences * refine.num_chunks * refine.rollouts_per_position)
