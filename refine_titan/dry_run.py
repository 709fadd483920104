"""Describes what a run would do, without training (`--dry-run`)."""

from pathlib import Path

import torch
from torchtitan.protocols.train_spec import get_train_spec

from refine_titan.checkpointing import complete_steps
from refine_titan.config.batch_plan import BatchPlan, plan_batch
from refine_titan.config.phases import has_rollouts, needs_engine, samples_answers
from refine_titan.config.sections import JobConfig, Refine
from refine_titan.data.ahead import batches_ahead
from refine_titan.data.dataloader import TokenBatch, build_dataloader
from refine_titan.data.epochs import with_steps
from refine_titan.estimation.checkpointing_choice import choose_checkpointing
from refine_titan.estimation.rounds import plan_rounds
from refine_titan.estimation.virtual_ranks import build_model, ranks_of, virtual_ranks
from refine_titan.models.sizes import resolve_args
from refine_titan.monitoring.resumed_settings import resumed_settings
from refine_titan.monitoring.run_folder import check_writable
from refine_titan.rollout.engine_memory import memory_needs
from refine_titan.validation import gpu_limit


def dry_run(config: JobConfig) -> str:
    """Checks config, data and tokenizer as a run does; describes model, batch, updates and the first microbatch.

    Raises:
        UserError: wherever the run itself would.
    """
    spec = get_train_spec(config.model.name)
    args = resolve_args(config.model)
    tokenizer = spec.build_tokenizer_fn(config)
    with torch.device("meta"):
        model = spec.model_cls(args)
    num_params, flops = args.get_nparams_and_flops(model, config.training.seq_len)

    ranks = ranks_of(config)
    training, refine = config.training, config.refine
    local_tokens = training.local_batch_size * training.seq_len // config.parallelism.context_parallel_degree
    plan = plan_batch(config, ranks)
    choice = choose_checkpointing(config, ranks)
    config = with_steps(choice.config, plan.sequences, keep=False)
    training = config.training
    check_writable(Path(config.job.dump_folder))
    data = build_dataloader(plan.data_ranks, 0, tokenizer, config)
    batch = data.next_batch()
    model_name = " ".join([config.model.name, config.model.flavor, *config.model.options])
    lines = [
        f"config:     {config.job.config_file or 'defaults and command line'}",
        f"model:      {model_name}, {num_params:,} parameters, {flops / 1e6:.1f} MFLOP per trained token",
        f"tokenizer:  {config.model.hf_assets_path or 'bytes'}, {tokenizer.get_vocab_size()} of {args.vocab_size} embeddings used",
        f"batch:      {_describe_sequences(config, plan)}; on {ranks} rank(s): {plan.microbatches} microbatch(es) of "
        f"{'up to ' if refine.phase == 'posttrain' else ''}{local_tokens:,} tokens per rank",
        f"updates:    {_describe_updates(config)} per batch, {training.steps} steps",
    ]
    if gpu_limit(args):
        lines.append(f"on a GPU:   not possible: {gpu_limit(args)}")
    if ranks > 1:
        lines.append(f"built:      {_build(config, ranks)}")
    if choice.words:
        lines.append(f"recomputes: {choice.words}")
    if has_rollouts(config):
        rollouts = plan.sequences * refine.num_chunks * refine.rollouts_per_position
        lines.append(
            f"rollouts:   {rollouts} per step ({refine.num_chunks} positions x {refine.rollouts_per_position} per sequence) of "
            f"{refine.rollout_length} tokens, {refine.selection} positions, {refine.reward} reward, engine {config.rollout.engine}"
        )
        lines.append(f"advantages: {_describe_advantages(refine)}")
    if needs_engine(config):
        lines.append(f"rounds:     {_describe_rounds(config, ranks)}")
        lines.append(f"memory:     a rank needs {memory_needs(config, args, ranks, torch.cuda.is_available())}")
    ahead = batches_ahead(config)
    made = f", the batches of {ahead} step(s) made in advance by a process beside each rank" if ahead else ""
    lines += [f"data:       {config.data.source}{made}", *(f"  {line}" for line in data.source_description())]
    lines += _describe_batch(batch, tokenizer)
    lines += [f"run folder: {config.job.dump_folder}", *_describe_resume(config)]
    return "\n".join(lines)


def _describe_sequences(config: JobConfig, plan: BatchPlan) -> str:
    seq_len, sequences = config.training.seq_len, plan.sequences
    if config.refine.phase == "posttrain":
        answer = config.posttrain.answer_tokens
        return f"{sequences} prompt(s) of at most {seq_len - answer} tokens per step, answers of at most {answer}"
    return f"{sequences} sequence(s) of {seq_len} tokens = {sequences * seq_len:,} tokens per step"


def _describe_updates(config: JobConfig) -> str:
    inner = f"{config.refine.num_mini_batches} optimizer step(s)"
    if config.refine.phase != "posttrain":
        return inner
    posttrain = config.posttrain
    outer = f"one on {'the answers' if posttrain.outer == 'sft' else f'{posttrain.samples} sampled answers per prompt, {posttrain.task}'}"
    return f"{inner} on the prompts, then {outer}" if posttrain.inner else outer


def _describe_advantages(refine: Refine) -> str:
    if refine.group_size == 1:
        return "each rollout's reward itself (groups of one)"
    divided = ", divided by their standard deviation" if refine.divide_advantage_by_std else ""
    return f"rewards of the {refine.group_size} rollouts of a {refine.resolved_advantage_group}, less their mean{divided}"


def _describe_rounds(config: JobConfig, ranks: int) -> str:
    """Says how many microbatches share a round of the engine, for rollouts and for the answers of post-training."""
    sizes = plan_rounds(config, ranks)
    in_training_pass = config.refine.scores_in_training_pass(config.refine.num_mini_batches)
    words = []
    if has_rollouts(config):
        size = sizes.trained if in_training_pass else sizes.scored
        words.append(f"rollouts of up to {size} microbatch(es) are sampled together")
    if samples_answers(config):
        words.append(f"answers of up to {sizes.answers}")
    return ", ".join(words)


def _describe_resume(config: JobConfig) -> list[str]:
    """Where a run with checkpoints goes on, and which settings have changed since; nothing for a run that starts."""
    checkpoint = config.checkpoint
    steps = complete_steps(Path(config.job.dump_folder, checkpoint.folder)) if checkpoint.enable else []
    step = max(steps, default=0) if checkpoint.load_step == -1 else checkpoint.load_step
    return [f"resumes:    after step {step}", *resumed_settings(config, step)] if step else []


def _build(config: JobConfig, ranks: int) -> str:
    """Builds the whole model as rank 0 of `ranks` ranks, without allocating it, and describes the result."""
    with virtual_ranks(config, ranks) as parallel_dims:
        parameters = list(build_model(config, resolve_args(config.model), parallel_dims).parameters())
        mesh = parameters[0].device_mesh
        axes = " x ".join(f"{name} {size}" for name, size in zip(mesh.mesh_dim_names, mesh.shape))
        held = sum(parameter.to_local().numel() for parameter in parameters)
    return f"at full size on {ranks} virtual ranks, {axes}; rank 0 holds {held:,} parameters"


def _describe_batch(batch: TokenBatch, tokenizer) -> list[str]:
    lines = [f"first microbatch of rank 0: {batch.tokens_T.shape[0]} tokens in {len(batch.document_names)} document(s)"]
    for name, start, end in zip(batch.document_names[:8], batch.cu_seqlens, batch.cu_seqlens[1:]):
        text = tokenizer.decode(batch.tokens_T[start : min(end, start + 60)].tolist())
        lines.append(f"  tokens {start}..{end}: {name}: {text[:60]!r}...")
    if len(batch.document_names) > 8:
        lines.append(f"  and {len(batch.document_names) - 8} more")
    return lines
