"""Checks of a run's settings that need more than one of them, or the machine, and `load_config`, which makes them.

The bounds of a single setting stand with its field in `config/`.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch

from refine_kernels.delta_rule import LARGEST_GPU_KEY
from refine_titan.checkpointing import complete_steps
from refine_titan.config.phases import has_rollouts, needs_engine, optimizer_steps_on_rollouts
from refine_titan.config.reading import read_config
from refine_titan.config.sections import JobConfig
from refine_titan.config.type_checks import did_you_mean, in_toml
from refine_titan.config.unread_settings import warn_of_settings_without_effect
from refine_titan.conversion.description import has_tokenizer
from refine_titan.data.epochs import ANOTHER_RUN
from refine_titan.distributed.compile import validate_compile
from refine_titan.distributed.context_parallel import validate_context_parallel
from refine_titan.distributed.float8 import validate_converters
from refine_titan.distributed.tensor_parallel import validate_tensor_parallel
from refine_titan.errors import UserError
from refine_titan.hub.settings import resolve_names
from refine_titan.hub.together import Companions
from refine_titan.models import FAMILIES
from refine_titan.models.decoder import DecoderArgs
from refine_titan.models.sizes import resolve_args
from refine_titan.objective.extensions import find_reward, find_selection
from refine_titan.objective.positions import MARGIN
from refine_titan.rollout.build import check_engine, warn_of_unread_settings
from refine_titan.starting_point import validate_start


def load_config(args: list[str], companions: Companions | None = None, values: dict[str, Any] | None = None) -> JobConfig:
    """Reads the settings of a command line, fetches what names of the Hugging Face Hub stand for, and checks all.

    Unknown flags, and values of the wrong type on the command line, end the process with a usage message.

    Args:
        companions: the ranks that fetch together; None for those of the environment.
        values: checked settings by section in place of a config file.

    Raises:
        UserError: naming the setting or file that is wrong, the value found and the values allowed.
    """
    config = read_config(args, values)
    config = resolve_names(config, has_checkpoints(config), companions)
    validate(config)
    return config


def validate(config: JobConfig) -> None:
    """Checks settings, each within its bounds, against each other and against this machine.

    Raises:
        UserError: at the first one that contradicts another, or that cannot be met here.
    """
    find_selection(config.refine.selection)
    find_reward(config.refine.reward)
    if config.refine.phase == "posttrain":
        _validate_post_training(config)
    if has_rollouts(config):
        _validate_rollouts(config)
    _validate_schedule(config)
    _validate_checkpoint(config)
    _validate_evaluation(config)
    _validate_metrics(config)
    _validate_profiling(config)
    _validate_model(config)
    validate_converters(config)
    validate_compile(config)
    warn_of_settings_without_effect(config)


def _validate_rollouts(config: JobConfig) -> None:
    refine, seq_len = config.refine, config.training.seq_len
    if refine.phase == "posttrain":
        seq_len -= config.posttrain.answer_tokens  # the longest prompt
    if seq_len <= 2 * MARGIN:
        raise UserError(f"training.seq_len leaves sequences of {seq_len} tokens, but rollouts need at least {2 * MARGIN + 1}")
    chunk = seq_len // refine.num_chunks
    if chunk <= 2 * MARGIN:
        raise UserError(
            f"refine.num_chunks is {refine.num_chunks}, which cuts sequences of {seq_len} tokens into chunks of {chunk}, but rollouts "
            f"need more than {2 * MARGIN}; allowed: at most {seq_len // (2 * MARGIN + 1)}"
        )
    _require(
        refine.rollout_length <= MARGIN,
        "refine.rollout_length",
        refine.rollout_length,
        f"1 to {MARGIN} (rollouts start up to {MARGIN} tokens before a document's end and are compared with what follows)",
    )
    minimum = config.data.min_document_tokens
    shortest = 2 * MARGIN + 1
    _require(minimum == 0 or minimum >= shortest, "data.min_document_tokens", minimum, f"0, or at least {shortest}, which rollouts need")
    if refine.group_size == 1 and not refine.allow_groups_of_one:
        raise UserError(
            f"refine.advantage_group = {refine.advantage_group!r} with num_chunks = {refine.num_chunks} and "
            f"rollouts_per_position = {refine.rollouts_per_position} compares every rollout with itself only; raise "
            "rollouts_per_position, use advantage_group = 'sequence' with several chunks, or set allow_groups_of_one = true"
        )
    if refine.temperature == 0 and refine.group_size == refine.rollouts_per_position > 1:  # a group is one position
        raise UserError(
            f"refine.temperature is 0 with refine.rollouts_per_position = {refine.rollouts_per_position} and refine.advantage_group = "
            f"{refine.advantage_group!r}, which compare the rollouts of one position: all the same at temperature 0; allowed: "
            "above 0, rollouts_per_position = 1, or advantage_group = 'sequence' with several chunks"
        )
    _validate_scoring_pass(config)


def _validate_scoring_pass(config: JobConfig) -> None:
    refine, ttt = config.refine, config.ttt
    if refine.scoring_pass != "training" or optimizer_steps_on_rollouts(config) == 1:
        return
    name, value, allowed = "refine.num_mini_batches", refine.num_mini_batches, "1"
    if refine.phase == "ttt":
        name, value, allowed = "ttt.batch_size", ttt.batch_size, f"at most ttt.mini_batch_size = {ttt.mini_batch_size}"
    raise UserError(
        f"{name} is {value}; allowed with refine.scoring_pass = 'training': {allowed} (after the first optimizer step the states of the "
        "scoring pass are those of other weights)"
    )


def _validate_post_training(config: JobConfig) -> None:
    posttrain, data, seq_len = config.posttrain, config.data, config.training.seq_len
    _require(posttrain.answer_tokens < seq_len, "posttrain.answer_tokens", posttrain.answer_tokens, f"below training.seq_len = {seq_len}")
    _require(
        data.holdout_percent == 0, "data.holdout_percent", data.holdout_percent, "0 with refine.phase = 'posttrain', which reads questions"
    )
    room = seq_len - posttrain.answer_tokens
    _require(
        data.min_document_tokens <= room,
        "data.min_document_tokens",
        data.min_document_tokens,
        f"at most training.seq_len - posttrain.answer_tokens = {room}",
    )


def _validate_schedule(config: JobConfig) -> None:
    if config.training.epochs:
        return  # the data say how many steps that are
    total, steps = config.lr_scheduler.total_steps, config.training.steps
    # Beyond its last step torchtitan's schedule gives negative learning rates, or fails.
    _require(total is None or total >= steps, "lr_scheduler.total_steps", total, f"at least training.steps = {steps}, or not set")


def _validate_checkpoint(config: JobConfig) -> None:
    checkpoint = config.checkpoint
    if config.training.epochs and "dataloader" in checkpoint.exclude_from_loading:
        raise UserError(
            f"checkpoint.exclude_from_loading has 'dataloader' and training.epochs is {config.training.epochs}, whose steps count from the "
            f"beginning of the data; allowed: one of them. Or {ANOTHER_RUN}"
        )
    if checkpoint.initial_load_in_hf and not checkpoint.initial_load_model_only:
        raise UserError(
            "checkpoint.initial_load_model_only is false with checkpoint.initial_load_in_hf = true; allowed: true (a Hugging Face "
            "folder holds a model only)"
        )
    if checkpoint.last_save_in_hf and not checkpoint.last_save_model_only:
        raise UserError(
            "checkpoint.last_save_model_only is false with checkpoint.last_save_in_hf = true; allowed: true (a Hugging Face folder "
            "holds a model only)"
        )


def _validate_metrics(config: JobConfig) -> None:
    if config.metrics.enable_wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "metrics.enable_wandb is true, but the package wandb is not installed (it is the extra `wandb` of refine_titan); allowed here: "
            "false"
        )


def _validate_profiling(config: JobConfig) -> None:
    profiling = config.profiling
    for name in ("enable_profiling", "enable_memory_snapshot"):
        if getattr(profiling, name) and not torch.cuda.is_available():
            raise UserError(f"profiling.{name} is true, but this machine has no GPU; allowed without one: false")
    shortest = profiling.profiler_warmup + profiling.profiler_active
    _require(
        profiling.profile_freq >= shortest,
        "profiling.profile_freq",
        profiling.profile_freq,
        f"at least profiling.profiler_warmup + profiling.profiler_active = {shortest}",
    )


def _validate_evaluation(config: JobConfig) -> None:
    settings = config.evaluation
    for name in ("data_folder", "essay_folder"):
        folder = getattr(settings, name)
        _require(not folder or Path(folder).is_dir(), f"evaluation.{name}", folder, "an existing folder")
    rollouts = config.rollout.engine
    if config.refine.phase == "ttt" and settings.engine not in ("auto", rollouts):
        raise UserError(
            f"evaluation.engine is {settings.engine!r} with rollout.engine = {rollouts!r} and refine.phase = 'ttt', where one engine "
            f"samples rollouts and answers; allowed: 'auto', {rollouts!r}, or rollout.engine = {settings.engine!r} too"
        )
    if not config.validation.enable:
        return
    _require(bool(settings.tasks), "evaluation.tasks", [], "at least one task with validation.enable = true")
    if settings.engine == "vllm":
        raise UserError("evaluation.engine is 'vllm' with validation.enable = true; allowed during training: 'auto', 'native'")


def _validate_model(config: JobConfig) -> None:
    name = config.model.name
    if name not in FAMILIES:
        raise UserError(f"model.name is {name!r}; allowed: {', '.join(FAMILIES)}{did_you_mean(name, FAMILIES)}")
    args = resolve_args(config.model)
    too_wide = gpu_limit(args)
    if too_wide and torch.cuda.is_available():
        raise UserError(f"model.flavor is {config.model.flavor!r}: {too_wide}")
    assets = config.model.hf_assets_path
    if assets and not has_tokenizer(Path(assets)):
        raise UserError(
            f"model.hf_assets_path is {assets!r}, which holds no tokenizer.json (nor vocab.json with merges.txt); allowed: a folder with "
            "Hugging Face's files, a model of the Hub (owner/name), or '' for the built-in tokenizer of bytes"
        )
    imported = config.experimental.custom_import
    if imported and importlib.util.find_spec(imported.partition(".")[0]) is None:
        raise UserError(f"experimental.custom_import is {imported!r}; allowed: a module that is installed")
    if config.parallelism.tensor_parallel_degree > 1:
        validate_tensor_parallel(args, name, config.parallelism.tensor_parallel_degree)
    if config.parallelism.context_parallel_degree > 1:
        validate_context_parallel(config, args)
    if needs_engine(config) or config.refine.phase == "ttt":  # which answers with it
        check_engine(config, args)
    warn_of_unread_settings(config)
    if not has_checkpoints(config):
        validate_start(config, args)


def gpu_limit(args: DecoderArgs) -> str | None:
    """Says what keeps a model from running on a GPU; None if nothing does."""
    channels = args.key_channels() or 0
    if channels <= LARGEST_GPU_KEY:
        return None
    return f"a head has {channels} key channels; allowed on a GPU: at most {LARGEST_GPU_KEY}, by flash-linear-attention's kernels"


def has_checkpoints(config: JobConfig) -> bool:
    """Whether the run goes on from a checkpoint of its own, whatever it once started from."""
    return config.checkpoint.enable and bool(complete_steps(Path(config.job.dump_folder, config.checkpoint.folder)))


def _require(holds: bool, name: str, value: Any, allowed: str) -> None:
    if not holds:
        raise UserError(f"{name} is {in_toml(value)}; allowed: {allowed}")
