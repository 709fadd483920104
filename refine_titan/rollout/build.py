"""The one door to the engines: names them, counts what they need, and builds them for a run.

`[rollout] engine` names a run's engine. To add one, write a file like `native_settings.py` and give it a name in `ENGINES`.
"""

import importlib.util
from dataclasses import fields, replace
from types import ModuleType
from typing import Literal

import torch
from torchtitan.tools.logging import logger

from refine_titan.config.sections import JobConfig, Rollout
from refine_titan.errors import UserError
from refine_titan.models.decoder import DecoderArgs, FastWeightDecoder
from refine_titan.rollout import native_settings, vllm_settings
from refine_titan.rollout.completion import CompletionEngine
from refine_titan.rollout.engine import RolloutEngine
from refine_titan.rollout.engine_host import EngineHost, EngineMemory
from refine_titan.rollout.page_pool import obstacle

EngineName = Literal["native", "vllm"]
ENGINES: dict[str, ModuleType] = {"native": native_settings, "vllm": vllm_settings}


def check_engine(config: JobConfig, args: DecoderArgs) -> None:
    """Checks that a run's engine can be built.

    Raises:
        UserError: naming the setting, the value found and what is allowed.
    """
    _kind(config).check(config, args)


def warn_of_unread_settings(config: JobConfig) -> None:
    """Warns of settings that were changed and that only an engine reads which the settings do not name."""
    defaults = {f.name: f.default for f in fields(Rollout)}
    for name, kind in ENGINES.items():
        changed = [s for s in kind.OWN_SETTINGS if getattr(config.rollout, s) != defaults[s]]
        if name not in (config.rollout.engine, config.evaluation.engine) and changed:
            logger.warning(f"rollout.{changed[0]} has no effect on rollouts with rollout.engine = {config.rollout.engine!r}")


def engine_dtype(config: JobConfig) -> torch.dtype:
    """Returns the dtype in which a run's engine computes."""
    return _kind(config).engine_dtype(config)


def engine_memory(config: JobConfig, model: FastWeightDecoder, num_ranks: int, gpu: bool) -> EngineMemory:
    """Counts what a run's engine needs on a rank, beside the trainer.

    Args:
        model: a model of the run's sizes; its tensors may be on the meta device.
        gpu: whether the run is on GPUs.
    """
    return _kind(config).count_memory(config, model, num_ranks, gpu)


def engine_gives_memory_back(config: JobConfig, gpu: bool) -> bool:
    """Whether the update can use the memory that a run's engine takes for its rounds."""
    return _kind(config).gives_memory_back(config, gpu)


def engine_changes_that_save_memory(config: JobConfig, num_ranks: int, gpu: bool) -> list[dict[str, object]]:
    """Returns settings, by their full names, with which a run's engine needs less memory."""
    return _kind(config).changes_that_save_memory(config, num_ranks, gpu)


def build_rollout_engine(config: JobConfig, host: EngineHost) -> RolloutEngine:
    """Builds a run's engine; every rank must do so at the same time.

    Raises:
        UserError: if its states do not fit into what is free.
        EngineError: if it cannot be built.
    """
    return _kind(config).build_rollout_engine(config, host)


def build_completion_engine(name: EngineName, config: JobConfig, host: EngineHost, *, width: int, max_tokens: int) -> CompletionEngine:
    """Builds an engine that completes prompts with the weights that the model has now.

    Args:
        width: outputs decoded at once.
        max_tokens: longest prompt and output together (vLLM).

    Raises:
        UserError: if vLLM is not installed or its states do not fit.
    """
    config = replace(config, rollout=replace(config.rollout, engine=name))
    return _kind(config).build_completion_engine(config, host, width=width, max_tokens=max_tokens)


def build_both_engines(
    config: JobConfig, host: EngineHost, *, width: int, max_tokens: int
) -> tuple[RolloutEngine | None, CompletionEngine]:
    """Builds what test-time training needs: an engine for rollouts and one for answers, which may be the same.

    Args:
        width: answers decoded at once.
        max_tokens: longest prompt and answer together (vLLM).

    Returns:
        The first is None if there is nothing to synchronise: no rollouts, and answers by the model itself.

    Raises:
        UserError: if vLLM is not installed or its states do not fit.
    """
    return _kind(config).build_both_engines(config, host, width=width, max_tokens=max_tokens)


def resolve_evaluation_engine(config: JobConfig, args: DecoderArgs, device: torch.device) -> EngineName:
    """Returns `evaluation.engine`, with `auto` resolved: in test-time training `rollout.engine`, else vLLM on a GPU where it is installed
    and runs the model.

    Raises:
        UserError: if vLLM is asked for, but is not installed or does not run the model.
    """
    if config.refine.phase == "ttt":
        return config.rollout.engine  # which `validate` has checked
    asked, installed = config.evaluation.engine, importlib.util.find_spec("vllm") is not None
    if asked == "auto":
        return "vllm" if installed and obstacle(args) is None and device.type == "cuda" else "native"
    if asked == "vllm" and not installed:
        raise UserError("evaluation.engine is 'vllm', but vllm is not installed; allowed without it: 'auto', 'native'")
    if asked == "vllm" and (hindrance := obstacle(args)):
        raise UserError(f"evaluation.engine is 'vllm', but the model has {hindrance}, which does not run there; allowed: 'auto', 'native'")
    return asked


def _kind(config: JobConfig) -> ModuleType:
    if config.rollout.engine not in ENGINES:
        raise UserError(f"rollout.engine is {config.rollout.engine!r}; allowed: {', '.join(map(repr, ENGINES))}")
    return ENGINES[config.rollout.engine]
