"""The native engine behind the door of `build.py`: its settings, its memory, and how it is built for a run."""

import torch

from refine_titan.config.batch_plan import least_microbatches_per_round
from refine_titan.config.phases import has_rollouts, needs_engine, samples_answers
from refine_titan.config.sections import JobConfig
from refine_titan.models.decoder import DecoderArgs, FastWeightDecoder
from refine_titan.rollout.decode_graph import CudaGraphs, can_record
from refine_titan.rollout.engine_host import EngineHost, EngineMemory
from refine_titan.rollout.native import MAX_LAYER_STEPS, NativeEngine
from refine_titan.rollout.native_completion import NativeCompletionEngine

# Settings of `[rollout]` that only this engine reads.
OWN_SETTINGS = ()


def check(config: JobConfig, args: DecoderArgs) -> None:
    """Accepts every config: the engine is the trainer's own model."""


def engine_dtype(config: JobConfig) -> torch.dtype:
    """Returns the dtype of the engine's arithmetic: that of the trainer's own model."""
    return getattr(torch, config.training.mixed_precision_param)


def count_memory(config: JobConfig, model: FastWeightDecoder, num_ranks: int, gpu: bool) -> EngineMemory:
    """Counts what recorded rounds keep: a copy of the weights in the compute dtype, and the states of every sequence."""
    if not _records_rounds(config, num_ranks, gpu) or model.model_args.has_attention:
        return EngineMemory(0, 0)
    master, compute = getattr(torch, config.training.dtype), engine_dtype(config)
    rounds = _rounds(config, least_microbatches_per_round(config, num_ranks))
    sequences = sum(n for n, k in rounds if model.model_args.n_layers * k <= MAX_LAYER_STEPS)
    needs_copy = compute != master and sequences > 0
    weights = sum(p.numel() for p in model.parameters()) * compute.itemsize if needs_copy else 0
    return EngineMemory(weights, sequences * sum(block.mixer.bytes_read_per_token(compute, 0) for block in model.layers.values()))


def gives_memory_back(config: JobConfig, gpu: bool) -> bool:
    """Whether the update can use the engine's memory: recorded rounds have to stay where they are."""
    return False


def changes_that_save_memory(config: JobConfig, num_ranks: int, gpu: bool) -> list[dict[str, object]]:
    """Returns settings with which the engine needs less."""
    return [{"rollout.cuda_graph": False}] if _records_rounds(config, num_ranks, gpu) else []


def build_rollout_engine(config: JobConfig, host: EngineHost) -> NativeEngine:
    """Builds the engine of a run, which records its rounds where `[rollout] cuda_graph` and the model allow it."""
    record = CudaGraphs().record if config.rollout.cuda_graph and can_record(host.model) else None
    return NativeEngine(host.model, host.precision, record)


def build_completion_engine(config: JobConfig, host: EngineHost, *, width: int, max_tokens: int) -> NativeCompletionEngine:
    """Builds an engine for long outputs, which reads prompts of any length."""
    return NativeCompletionEngine(host.model, host.model.model_args.vocab_size, host.device, width=width, precision=host.precision)


def build_both_engines(
    config: JobConfig, host: EngineHost, *, width: int, max_tokens: int
) -> tuple[NativeEngine | None, NativeCompletionEngine]:
    """Builds an engine for rollouts, if the run has any, and one for answers."""
    rollouts = build_rollout_engine(config, host) if needs_engine(config) else None
    return rollouts, build_completion_engine(config, host, width=width, max_tokens=max_tokens)


def _records_rounds(config: JobConfig, num_ranks: int, gpu: bool) -> bool:
    return config.rollout.cuda_graph and gpu and num_ranks == 1 and needs_engine(config)


def _rounds(config: JobConfig, microbatches: int) -> list[tuple[int, int]]:
    """Returns the number of sequences and of tokens of each kind of round, over so many microbatches."""
    sequences, refine, posttrain = config.training.local_batch_size * microbatches, config.refine, config.posttrain
    rounds = []
    if has_rollouts(config):
        rounds.append((sequences * refine.num_chunks * refine.rollouts_per_position, refine.rollout_length))
    if samples_answers(config):
        rounds.append((sequences * posttrain.samples, posttrain.answer_tokens))
    return rounds
