"""Warns of settings that were changed although they have no effect in a run."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from torchtitan.tools.logging import logger

from refine_titan.config.phases import has_inner_steps, has_rollouts, optimizer_steps_on_rollouts
from refine_titan.config.sections import JobConfig


def warn_of_settings_without_effect(config: JobConfig) -> None:
    """Warns of settings that were changed and have no effect in the run's phase. Those that only another engine reads are known to
    `rollout/build.py`."""
    for words in _without_effect(config):
        logger.warning(words)


def _without_effect(config: JobConfig) -> Iterator[str]:
    if config.refine.phase == "ttt":
        for name in _changed(config.lr_scheduler):
            yield f"lr_scheduler.{name} has no effect with refine.phase = 'ttt': every optimizer step has the learning rate optimizer.lr"
        if "num_mini_batches" in _changed(config.refine):
            yield "refine.num_mini_batches has no effect with refine.phase = 'ttt': ttt.mini_batch_size splits a batch"
    yield from _penalties_in_vain(config)


def _penalties_in_vain(config: JobConfig) -> Iterator[str]:
    refine = config.refine
    for name in ("kl_coef", "entropy_coef"):
        if getattr(refine, name) and not has_inner_steps(config):
            yield f"refine.{name} has no effect with posttrain.inner = false: the loss of answers has no such term"
    if refine.kl_coef and has_rollouts(config) and optimizer_steps_on_rollouts(config) == 1:
        where = "ttt.steps, ttt.batch_size, ttt.mini_batch_size" if refine.phase == "ttt" else "refine.num_mini_batches"
        yield f"refine.kl_coef has no effect with one optimizer step on a batch's rollouts ({where}): it begins with their own policy"


def _changed(section: Any) -> list[str]:
    """Names of a section's settings that do not have their defaults."""
    defaults = type(section)()
    return [f.name for f in fields(section) if getattr(section, f.name) != getattr(defaults, f.name)]
