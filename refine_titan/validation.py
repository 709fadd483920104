"""Reads TOML and command line into a JobConfig and checks every value before anything is built."""

import importlib.util
import math
import typing
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import tomli
import torch
from torchtitan.config import ConfigManager
from torchtitan.tools.logging import logger

from refine_titan.checkpointing import complete_steps
from refine_titan.config.phases import has_rollouts, needs_engine
from refine_titan.config.sections import JobConfig, Model, Rollout
from refine_titan.config.type_checks import describe, matches, suggest
from refine_titan.distributed.compile import validate_compile
from refine_titan.distributed.context_parallel import validate_context_parallel
from refine_titan.distributed.float8 import validate_converters
from refine_titan.distributed.tensor_parallel import validate_tensor_parallel
from refine_titan.errors import UserError
from refine_titan.models import FAMILIES
from refine_titan.models.sizes import resolve_flavor
from refine_titan.objective.extensions import find_reward, find_selection
from refine_titan.objective.positions import MARGIN
from refine_titan.rollout.vllm_settings import VLLM_SETTINGS, validate_engine
from refine_titan.starting_point import validate_start

OPTIMIZERS = ("Adam", "AdamW")  # those of torchtitan 0.2.2


class RefineConfigManager(ConfigManager):
    """torchtitan's manager (command line over TOML over defaults) with errors that name the key and the nearest one."""

    def __init__(self):
        super().__init__(JobConfig)

    def _maybe_load_toml(self, args: list[str]) -> dict[str, Any] | None:
        path = _config_file(args)
        if path is None:
            return None
        try:
            values = tomli.loads(Path(path).read_text(encoding="utf-8"))
        except (FileNotFoundError, IsADirectoryError) as error:
            raise UserError(f"--job.config_file: {path} is not a file") from error
        except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not valid TOML: {error}") from error
        check_toml(values, JobConfig, where=path)
        return values

    def _validate_config(self) -> None:
        # torchtitan's own checks are about the tokenizer path, which is optional here; ours cover it.
        validate(self.config)


def load_config(args: list[str]) -> JobConfig:
    """Parses `args` (with `--job.config_file PATH`), merges the file, and validates the result.

    Raises:
        UserError: naming the key or file that is wrong. Unknown flags end the process with a usage message.
    """
    return RefineConfigManager().parse_args(args)


def check_toml(values: dict[str, Any], section_class: type, where: str, prefix: str = "") -> None:
    """Raises UserError at the first key that `section_class` does not have or whose value has another type."""
    hints = typing.get_type_hints(section_class)
    names = [f.name for f in fields(section_class)]
    for key, value in values.items():
        if key not in names:
            raise UserError(f"{where}: unknown key {prefix + key!r}{suggest(key, names, prefix)}")
        hint = hints[key]
        if is_dataclass(hint):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {prefix + key} is a section ([{prefix + key}]), got {value!r}")
            check_toml(value, hint, where, f"{prefix}{key}.")
        elif not matches(value, hint):
            raise UserError(f"{where}: {prefix + key} is {value!r}; allowed: {describe(hint)}")


def validate(config: JobConfig) -> None:
    """Raises UserError at the first setting that is out of range or contradicts another."""
    refine, training, data = config.refine, config.training, config.data
    _require_finite(config)
    for name in ("num_chunks", "rollout_length", "rollouts_per_position", "num_mini_batches", "snapshot_stride"):
        _require(getattr(refine, name) >= 1, f"refine.{name}", getattr(refine, name), "at least 1")
    for name in ("temperature", "ntp_coef", "rl_coef", "kl_coef", "entropy_coef", "clip_high"):
        _require(getattr(refine, name) >= 0, f"refine.{name}", getattr(refine, name), "at least 0")
    _require(0 <= refine.clip_low < 1, "refine.clip_low", refine.clip_low, "at least 0 and below 1")
    _require(refine.clip_dual > 1, "refine.clip_dual", refine.clip_dual, "above 1")
    _require(refine.selection_temperature > 0, "refine.selection_temperature", refine.selection_temperature, "above 0")
    find_selection(refine.selection)
    find_reward(refine.reward)
    for name in ("seq_len", "steps", "local_batch_size", "max_norm", "gc_freq"):
        _require(getattr(training, name) > 0, f"training.{name}", getattr(training, name), "above 0")
    size = training.global_batch_size
    _require(size > 0 or size == -1, "training.global_batch_size", size, "above 0, or -1 for one microbatch a rank")
    _require(bool(data.source), "data.source", data.source, "'python-stdlib', 'synthetic', or a path")
    _require(bool(data.folder_suffixes), "data.folder_suffixes", data.folder_suffixes, "at least one suffix")
    _require(data.min_document_tokens >= 0, "data.min_document_tokens", data.min_document_tokens, "0 or more")
    _require(data.shuffle_buffer >= 1, "data.shuffle_buffer", data.shuffle_buffer, "at least 1")
    _require(data.num_streams >= 0, "data.num_streams", data.num_streams, "0 (one a data-parallel rank) or more")
    _require(data.synthetic_needles >= 1, "data.synthetic_needles", data.synthetic_needles, "at least 1")
    _require(config.optimizer.lr >= 0, "optimizer.lr", config.optimizer.lr, "at least 0")
    _require(config.optimizer.name in OPTIMIZERS, "optimizer.name", config.optimizer.name, " or ".join(OPTIMIZERS))
    warmup = config.lr_scheduler.warmup_steps
    _require(warmup >= 0, "lr_scheduler.warmup_steps", warmup, "at least 0")
    _require(config.metrics.log_freq >= 1, "metrics.log_freq", config.metrics.log_freq, "at least 1")
    _require(config.checkpoint.interval >= 1, "checkpoint.interval", config.checkpoint.interval, "at least 1")
    keep, load_step = config.checkpoint.keep_latest_k, config.checkpoint.load_step
    _require(keep == 0 or keep >= 2, "checkpoint.keep_latest_k", keep, "0 (keep all) or at least 2")
    _require(load_step >= -1, "checkpoint.load_step", load_step, "a step, or -1 for the latest")
    if config.debug.seed is None:
        raise UserError("debug.seed is not set; every draw derives from it: give a whole number")
    rollout = config.rollout
    _require(rollout.max_logprob_gap > 0, "rollout.max_logprob_gap", rollout.max_logprob_gap, "above 0")
    _require(rollout.cache_gib >= 0, "rollout.cache_gib", rollout.cache_gib, "at least 0")
    cap = rollout.importance_ratio_cap
    _require(cap == 0 or cap >= 1, "rollout.importance_ratio_cap", cap, "0 (no correction), or at least 1")
    if refine.phase == "posttrain":
        _validate_post_training(config)
    elif refine.phase == "ttt":
        _validate_test_time_training(config)
    if has_rollouts(config):
        _validate_rollouts(config)
    _validate_evaluation(config)
    _validate_model(config)
    validate_converters(config)
    validate_compile(config)
    _validate_activation_checkpoint(config)
    _refuse_unsupported(config)


@dataclass(frozen=True)
class BatchPlan:
    """How a step's batch is spread: sequences over all ranks, microbatches (forwards) of a rank, and data-parallel ranks."""

    sequences: int
    microbatches: int
    data_ranks: int


def plan_batch(config: JobConfig, num_ranks: int) -> BatchPlan:
    """Spreads a batch over ranks.

    Raises:
        UserError: if batch sizes, mini-batches or parallel degrees do not fit the number of ranks.
    """
    training, parallelism = config.training, config.parallelism
    replicas, shards = parallelism.data_parallel_replicate_degree, parallelism.data_parallel_shard_degree
    _require(replicas >= 1, "parallelism.data_parallel_replicate_degree", replicas, "at least 1")
    _require(shards >= 1 or shards == -1, "parallelism.data_parallel_shard_degree", shards, "at least 1, or -1")
    tensor, context = parallelism.tensor_parallel_degree, parallelism.context_parallel_degree
    _require(tensor >= 1, "parallelism.tensor_parallel_degree", tensor, "at least 1")
    _require(context >= 1, "parallelism.context_parallel_degree", context, "at least 1")
    inner = tensor * context
    if num_ranks % (replicas * inner) or (shards != -1 and replicas * shards * inner != num_ranks):
        raise UserError(
            f"parallelism.data_parallel_replicate_degree = {replicas} times data_parallel_shard_degree = {shards} times "
            f"tensor_parallel_degree = {tensor} times context_parallel_degree = {context} must be the number of processes, "
            f"{num_ranks} (-1 takes what is left)"
        )
    if replicas > 1 and replicas * tensor == num_ranks:
        raise UserError(
            f"parallelism.data_parallel_replicate_degree is {replicas} with nothing sharded: plain replication is not "
            "supported; shard (data_parallel_replicate_degree = 1) or combine both (HSDP)"
        )
    data_ranks = num_ranks // inner
    unit = training.local_batch_size * data_ranks
    sequences = unit if training.global_batch_size == -1 else training.global_batch_size
    if sequences % unit:
        raise UserError(
            f"training.global_batch_size is {sequences}; it must be a multiple of training.local_batch_size * data-parallel ranks = {unit}"
        )
    microbatches = sequences // unit
    if microbatches % config.refine.num_mini_batches:
        raise UserError(
            f"refine.num_mini_batches is {config.refine.num_mini_batches}, but a batch has {microbatches} microbatch(es) a "
            "rank (training.global_batch_size / (training.local_batch_size * data-parallel ranks)); it must be a divisor of that"
        )
    streams = config.data.num_streams or data_ranks
    if streams % data_ranks or sequences % streams:
        allowed = [d for d in range(data_ranks, sequences + 1, data_ranks) if sequences % d == 0]
        raise UserError(
            f"data.num_streams is {streams}; it must be a multiple of the {data_ranks} data-parallel rank(s) and divide the "
            f"{sequences} sequence(s) of a batch; allowed: 0, {', '.join(map(str, allowed))}"
        )
    return BatchPlan(sequences, microbatches, data_ranks)


def _validate_rollouts(config: JobConfig) -> None:
    refine, seq_len = config.refine, config.training.seq_len
    if refine.phase == "posttrain":
        seq_len -= config.posttrain.answer_tokens  # the longest prompt
    chunk = seq_len // refine.num_chunks
    if chunk <= 2 * MARGIN:
        raise UserError(
            f"refine.num_chunks is {refine.num_chunks} for training.seq_len = {seq_len}: a chunk has {chunk} tokens, "
            f"needed are more than {2 * MARGIN}; allowed: at most {max(seq_len // (2 * MARGIN + 1), 1)}"
        )
    _require(
        refine.rollout_length <= MARGIN,
        "refine.rollout_length",
        refine.rollout_length,
        f"1 to {MARGIN} (rollouts start up to {MARGIN} tokens before a document's end and are compared with what follows)",
    )
    minimum = config.data.min_document_tokens
    if 0 < minimum <= 2 * MARGIN:
        raise UserError(f"data.min_document_tokens is {minimum}; rollouts need documents of at least {2 * MARGIN + 1} tokens")
    group = advantage_group(config)
    size = refine.rollouts_per_position * (refine.num_chunks if group == "sequence" else 1)
    if size == 1 and not refine.allow_groups_of_one:
        raise UserError(
            f"refine.advantage_group = {refine.advantage_group!r} with num_chunks = {refine.num_chunks} and "
            f"rollouts_per_position = {refine.rollouts_per_position} compares every rollout with itself only; raise "
            "rollouts_per_position, use advantage_group = 'sequence' with several chunks, or set allow_groups_of_one = true"
        )
    if refine.scoring_pass == "training" and refine.num_mini_batches > 1:
        raise UserError(
            f"refine.scoring_pass = 'training' needs refine.num_mini_batches = 1, got {refine.num_mini_batches}: after the "
            "first optimizer step the scored states are those of other weights"
        )


def _validate_post_training(config: JobConfig) -> None:
    posttrain, data, seq_len = config.posttrain, config.data, config.training.seq_len
    _require(
        1 <= posttrain.answer_tokens < seq_len,
        "posttrain.answer_tokens",
        posttrain.answer_tokens,
        f"at least 1 and below training.seq_len = {seq_len}",
    )
    _require(posttrain.temperature > 0, "posttrain.temperature", posttrain.temperature, "above 0")
    if posttrain.outer == "reward":
        _require(posttrain.samples >= 2, "posttrain.samples", posttrain.samples, "at least 2, which are compared with each other")
        _require(posttrain.task.count("/") == 1, "posttrain.task", posttrain.task, "benchmark/task, e.g. 'longbench/hotpotqa'")
    _require(bool(data.prompt_column), "data.prompt_column", data.prompt_column, "the name of a column")
    room = seq_len - posttrain.answer_tokens
    _require(
        data.min_document_tokens <= room,
        "data.min_document_tokens",
        data.min_document_tokens,
        f"at most training.seq_len - posttrain.answer_tokens = {room}",
    )


def _validate_test_time_training(config: JobConfig) -> None:
    for name in ("steps", "batch_size", "mini_batch_size"):
        _require(getattr(config.ttt, name) >= 1, f"ttt.{name}", getattr(config.ttt, name), "at least 1")


def advantage_group(config: JobConfig) -> str:
    """`sequence` or `position`, with `auto` resolved."""
    if config.refine.advantage_group != "auto":
        return config.refine.advantage_group
    return "sequence" if config.refine.rollouts_per_position == 1 else "position"


def _validate_evaluation(config: JobConfig) -> None:
    settings, validation = config.evaluation, config.validation
    for name in ("num_samples", "max_prompt_tokens", "perplexity_tokens"):
        _require(getattr(settings, name) >= 0, f"evaluation.{name}", getattr(settings, name), "0 or more")
    for name in ("batch_size", "perplexity_bin_tokens"):
        _require(getattr(settings, name) >= 1, f"evaluation.{name}", getattr(settings, name), "at least 1")
    _require(settings.perplexity_tokens != 1, "evaluation.perplexity_tokens", 1, "0 or at least 2")
    for length in settings.lengths:
        _require(length >= 1, "evaluation.lengths", length, "at least 1 each")
    _require("" not in settings.tasks, "evaluation.tasks", "", "names of tasks, or paths")
    for name in ("data_folder", "essay_folder"):
        folder = getattr(settings, name)
        _require(not folder or Path(folder).is_dir(), f"evaluation.{name}", folder, "an existing folder")
    if not validation.enable:
        return
    _require(validation.freq >= 1, "validation.freq", validation.freq, "at least 1")
    _require(bool(settings.tasks), "evaluation.tasks", [], "at least one task with validation.enable = true")
    if settings.engine == "vllm":
        raise UserError("evaluation.engine is 'vllm' with validation.enable = true; allowed during training: 'auto', 'native'")


def _validate_model(config: JobConfig) -> None:
    name, flavor = config.model.name, config.model.flavor
    if name not in FAMILIES:
        raise UserError(f"model.name is {name!r}; allowed: {', '.join(FAMILIES)}{suggest(name, list(FAMILIES))}")
    args = resolve_flavor(name, flavor)
    assets = config.model.hf_assets_path
    if assets and not Path(assets, "tokenizer.json").is_file():
        raise UserError(
            f"model.hf_assets_path is {assets!r}, which holds no tokenizer.json; set it to a folder with Hugging Face's files, "
            "empty means byte-level"
        )
    imported = config.experimental.custom_import
    if imported and importlib.util.find_spec(imported.partition(".")[0]) is None:
        raise UserError(f"experimental.custom_import is {imported!r}, which is not installed")
    if config.model.newton_schulz_dtype != Model().newton_schulz_dtype and not hasattr(args, "newton_schulz_dtype"):
        logger.warning(f"model.newton_schulz_dtype has no effect on {name}: it has no Muon updates")
    if config.parallelism.tensor_parallel_degree > 1:
        validate_tensor_parallel(args, name, config.parallelism.tensor_parallel_degree)
    if config.parallelism.context_parallel_degree > 1:
        validate_context_parallel(config, args)
    if needs_engine(config) and config.rollout.engine == "vllm":
        validate_engine(config, args)
    unused = [f.name for f in fields(Rollout) if f.name in VLLM_SETTINGS and getattr(config.rollout, f.name) != f.default]
    if config.rollout.engine == "native" and unused:
        logger.warning(f"rollout.{unused[0]} has no effect with rollout.engine = 'native'")
    if not has_checkpoints(config):
        validate_start(config, args)


def _validate_activation_checkpoint(config: JobConfig) -> None:
    option = config.activation_checkpoint.selective_ac_option
    if config.activation_checkpoint.mode == "selective" and not (option == "op" or option.isdecimal() and int(option) > 0):
        raise UserError(f"activation_checkpoint.selective_ac_option is {option!r}; allowed: 'op', or n for every n-th layer, at least '1'")


def has_checkpoints(config: JobConfig) -> bool:
    """Whether the run goes on from a checkpoint of its own, whatever it once started from."""
    return config.checkpoint.enable and bool(complete_steps(Path(config.job.dump_folder, config.checkpoint.folder)))


def _refuse_unsupported(config: JobConfig) -> None:
    """Settings of torchtitan that would otherwise be ignored or give wrong gradients."""
    parallelism = config.parallelism
    unsupported = {
        "parallelism.pipeline_parallel_degree": parallelism.pipeline_parallel_degree > 1,
        "parallelism.context_parallel_load_balancer": parallelism.context_parallel_load_balancer is not None,
        "parallelism.expert_parallel_degree": parallelism.expert_parallel_degree > 1,
        "fault_tolerance.enable": config.fault_tolerance.enable,
        "memory_estimation.enable": config.memory_estimation.enable,
        "optimizer.early_step_in_backward": config.optimizer.early_step_in_backward,
        "comm.mode = 'local_tensor'": config.comm.mode == "local_tensor",
        "activation_checkpoint.mode = 'memory_budget' (blocks are not compiled as wholes)": config.activation_checkpoint.mode
        == "memory_budget",
        "profiling.enable_profiling without a GPU": config.profiling.enable_profiling and not torch.cuda.is_available(),
        "profiling.enable_memory_snapshot without a GPU": config.profiling.enable_memory_snapshot and not torch.cuda.is_available(),
        "job.custom_config_module (refine_titan's sections are built in)": bool(config.job.custom_config_module),
        "training.dataset_path (use data.source)": config.training.dataset_path is not None,
        "training.dataset (use data.source)": config.training.dataset != "c4_test",
        "model.tokenizer_path (use model.hf_assets_path)": config.model.tokenizer_path is not None,
    }
    for name, is_set in unsupported.items():
        if is_set:
            raise UserError(f"{name} is set, but is not supported")


def _require_finite(section: Any, prefix: str = "") -> None:
    for f in fields(section):
        value = getattr(section, f.name)
        if is_dataclass(value):
            _require_finite(value, f"{prefix}{f.name}.")
        elif isinstance(value, float):
            _require(math.isfinite(value), prefix + f.name, value, "a finite number")


def _require(holds: bool, name: str, value: Any, allowed: str) -> None:
    if not holds:
        raise UserError(f"{name} is {value!r}; allowed: {allowed}")


def _config_file(args: list[str]) -> str | None:
    """The last one given: run_train.sh names a default before the caller's arguments."""
    path = None
    for i, arg in enumerate(args):
        key, _, value = arg.partition("=")
        if key in ("--job.config_file", "--job.config-file"):
            if not value and i + 1 == len(args):
                raise UserError("--job.config_file needs a path")
            path = value or args[i + 1]
    return path
