"""Reads TOML and command line into a JobConfig and checks every value before anything is built."""

import difflib
import types
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import tomli
from torchtitan.config import ConfigManager

from refine_titan.errors import UserError
from refine_titan.job_config import JobConfig
from refine_titan.models import FAMILIES
from refine_titan.objective.positions import MARGIN


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
            raise UserError(f"{where}: unknown key {prefix + key!r}{_suggest(key, names, prefix)}")
        hint = hints[key]
        if is_dataclass(hint):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {prefix + key} is a section ([{prefix + key}]), got {value!r}")
            check_toml(value, hint, where, f"{prefix}{key}.")
        elif not _matches(value, hint):
            raise UserError(f"{where}: {prefix + key} is {value!r}; allowed: {_describe(hint)}")


def validate(config: JobConfig) -> None:
    """Raises UserError at the first setting that is out of range or contradicts another."""
    refine, training, data = config.refine, config.training, config.data
    for name in ("num_chunks", "rollout_length", "rollouts_per_position", "num_mini_batches", "snapshot_stride"):
        _require(getattr(refine, name) >= 1, f"refine.{name}", getattr(refine, name), "at least 1")
    for name in ("temperature", "ntp_coef", "rl_coef", "kl_coef", "entropy_coef", "clip_high"):
        _require(getattr(refine, name) >= 0, f"refine.{name}", getattr(refine, name), "at least 0")
    _require(0 <= refine.clip_low < 1, "refine.clip_low", refine.clip_low, "at least 0 and below 1")
    _require(refine.clip_dual > 1, "refine.clip_dual", refine.clip_dual, "above 1")
    _require(refine.selection_temperature > 0, "refine.selection_temperature", refine.selection_temperature, "above 0")
    for name in ("seq_len", "steps", "local_batch_size", "max_norm", "gc_freq"):
        _require(getattr(training, name) > 0, f"training.{name}", getattr(training, name), "above 0")
    _require(data.min_document_tokens >= 0, "data.min_document_tokens", data.min_document_tokens, "0 or more")
    _require(data.shuffle_buffer >= 1, "data.shuffle_buffer", data.shuffle_buffer, "at least 1")
    _require(data.synthetic_needles >= 1, "data.synthetic_needles", data.synthetic_needles, "at least 1")
    _require(config.optimizer.lr >= 0, "optimizer.lr", config.optimizer.lr, "at least 0")
    _require(config.metrics.log_freq >= 1, "metrics.log_freq", config.metrics.log_freq, "at least 1")
    _require(config.checkpoint.interval >= 1, "checkpoint.interval", config.checkpoint.interval, "at least 1")
    _require(config.checkpoint.keep_latest_k != 1, "checkpoint.keep_latest_k", 1, "0 (keep all) or at least 2")
    if config.debug.seed is None:
        raise UserError("debug.seed is not set; every draw derives from it: give a whole number")
    if refine.objective == "refine":
        _validate_rollouts(config)
    _validate_model(config)
    _refuse_unsupported(config)


def mini_batch_error(num_mini_batches: int, microbatches: int) -> str | None:
    """What is wrong with splitting a batch of so many microbatches (per rank), or None."""
    if microbatches % num_mini_batches == 0:
        return None
    return (
        f"refine.num_mini_batches is {num_mini_batches}, but a batch has {microbatches} microbatches a rank "
        "(training.global_batch_size / (training.local_batch_size * data-parallel ranks)); it must be a divisor of that"
    )


def _validate_rollouts(config: JobConfig) -> None:
    refine, seq_len = config.refine, config.training.seq_len
    chunk = seq_len // refine.num_chunks
    if chunk <= 2 * MARGIN:
        raise UserError(
            f"refine.num_chunks is {refine.num_chunks} for training.seq_len = {seq_len}: a chunk has {chunk} tokens, "
            f"needed are more than {2 * MARGIN}; allowed: at most {max(seq_len // (2 * MARGIN + 1), 1)}"
        )
    _require(refine.rollout_length <= MARGIN, "refine.rollout_length", refine.rollout_length, f"1 to {MARGIN} (rollouts "
             f"start up to {MARGIN} tokens before a document's end and are compared with what follows)")  # fmt: skip
    minimum = config.data.min_document_tokens
    if 0 < minimum <= 2 * MARGIN:
        raise UserError(
            f"data.min_document_tokens is {minimum}; rollouts need documents of at least {2 * MARGIN + 1} tokens"
        )
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


def advantage_group(config: JobConfig) -> str:
    """`sequence` or `position`, with `auto` resolved."""
    if config.refine.advantage_group != "auto":
        return config.refine.advantage_group
    return "sequence" if config.refine.rollouts_per_position == 1 else "position"


def _validate_model(config: JobConfig) -> None:
    name, flavor = config.model.name, config.model.flavor
    if name not in FAMILIES:
        raise UserError(f"model.name is {name!r}; allowed: {', '.join(FAMILIES)}{_suggest(name, list(FAMILIES))}")
    flavors = list(FAMILIES[name].FLAVORS)
    if flavor not in flavors:
        raise UserError(f"model.flavor is {flavor!r}; {name} has: {', '.join(flavors)}{_suggest(flavor, flavors)}")
    assets = config.model.hf_assets_path
    if assets and not Path(assets, "tokenizer.json").is_file():
        raise UserError(f"model.hf_assets_path is {assets!r}, which holds no tokenizer.json; empty means byte-level")


def _refuse_unsupported(config: JobConfig) -> None:
    """Settings of torchtitan that would otherwise be ignored or give wrong gradients."""
    parallelism = config.parallelism
    unsupported = {
        "parallelism.pipeline_parallel_degree": parallelism.pipeline_parallel_degree > 1,
        "parallelism.tensor_parallel_degree": parallelism.tensor_parallel_degree > 1,
        "parallelism.context_parallel_degree": parallelism.context_parallel_degree > 1,
        "parallelism.expert_parallel_degree": parallelism.expert_parallel_degree > 1,
        "compile.enable": config.compile.enable,
        "model.converters": bool(config.model.converters),
        "validation.enable": config.validation.enable,
        "fault_tolerance.enable": config.fault_tolerance.enable,
        "memory_estimation.enable": config.memory_estimation.enable,
        "optimizer.early_step_in_backward": config.optimizer.early_step_in_backward,
        "training.dataset_path (use data.source)": config.training.dataset_path is not None,
        "training.dataset (use data.source)": config.training.dataset != "c4_test",
        "model.tokenizer_path (use model.hf_assets_path)": config.model.tokenizer_path is not None,
    }
    for name, is_set in unsupported.items():
        if is_set:
            raise UserError(f"{name} is set, but is not supported")


def _require(holds: bool, name: str, value: Any, allowed: str) -> None:
    if not holds:
        raise UserError(f"{name} is {value!r}; allowed: {allowed}")


def _config_file(args: list[str]) -> str | None:
    for i, arg in enumerate(args):
        key, _, value = arg.partition("=")
        if key in ("--job.config_file", "--job.config-file"):
            if value:
                return value
            if i + 1 < len(args):
                return args[i + 1]
            raise UserError("--job.config_file needs a path")
    return None


def _suggest(word: str, candidates: list[str], prefix: str = "") -> str:
    nearest = difflib.get_close_matches(word, candidates, n=1, cutoff=0.5)
    return f"; did you mean {prefix + nearest[0]!r}?" if nearest else f"; known: {', '.join(candidates)}"


def _matches(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(hint))
    if origin is list:
        return isinstance(value, list) and all(_matches(item, typing.get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return ", ".join(repr(option) for option in typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint) if option is not type(None))
    if origin is list:
        return f"a list of {_describe(typing.get_args(hint)[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}.get(hint, str(hint))
