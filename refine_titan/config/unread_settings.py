"""Warns of settings that were changed although a run does not read them."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from torchtitan.tools.logging import logger

from refine_titan.config.sections import JobConfig


def warn_of_settings_without_effect(config: JobConfig) -> None:
    """Warns of settings that were changed and have no effect in the run's phase. Those that only another engine reads are known to
    `rollout/build.py`."""
    for words in _unread(config):
        logger.warning(words)


def _unread(config: JobConfig) -> Iterator[str]:
    if config.refine.phase == "ttt":
        for name in _changed(config.lr_scheduler):
            yield f"lr_scheduler.{name} has no effect with refine.phase = 'ttt': every optimizer step has the learning rate optimizer.lr"
        if "num_mini_batches" in _changed(config.refine):
            yield "refine.num_mini_batches has no effect with refine.phase = 'ttt': ttt.mini_batch_size splits a batch"


def _changed(section: Any) -> list[str]:
    """Names of a section's settings that do not have their defaults."""
    defaults = type(section)()
    return [f.name for f in fields(section) if getattr(section, f.name) != getattr(defaults, f.name)]
