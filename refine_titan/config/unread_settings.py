"""Warns of settings that were changed although they have no effect in a run."""

from collections.abc import Iterator

from torchtitan.tools.logging import logger

from refine_titan.config.phases import has_inner_steps, has_rollouts, optimizer_steps_on_rollouts
from refine_titan.config.sections import JobConfig


def warn_of_settings_without_effect(config: JobConfig) -> None:
    """Warns of penalties that are asked for and have no effect in the run. Settings that only another engine reads are known to
    `rollout/build.py`."""
    for words in _penalties_in_vain(config):
        logger.warning(words)


def _penalties_in_vain(config: JobConfig) -> Iterator[str]:
    refine = config.refine
    for name in ("kl_coef", "entropy_coef"):
        if getattr(refine, name) and not has_inner_steps(config):
            yield f"refine.{name} has no effect with posttrain.inner = false: the loss of answers has no such term"
    if refine.kl_coef and has_rollouts(config) and optimizer_steps_on_rollouts(config) == 1:
        where = "ttt.steps, ttt.batch_size, ttt.mini_batch_size" if refine.phase == "ttt" else "refine.num_mini_batches"
        yield f"refine.kl_coef has no effect with one optimizer step on a batch's rollouts ({where}): it begins with their own policy"
