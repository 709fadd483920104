"""What the training phases consist of."""

from refine_titan.config.sections import JobConfig


def has_inner_steps(config: JobConfig) -> bool:
    """Whether a batch's documents or prompts are trained on by `refine.objective`."""
    return config.refine.phase != "posttrain" or config.posttrain.inner


def has_rollouts(config: JobConfig) -> bool:
    """Whether a batch's steps begin with rollouts."""
    return config.refine.objective == "refine" and has_inner_steps(config)


def samples_answers(config: JobConfig) -> bool:
    """Whether answers are sampled, to be rewarded."""
    return config.refine.phase == "posttrain" and config.posttrain.outer == "reward"


def needs_engine(config: JobConfig) -> bool:
    """Whether anything is sampled: rollouts, or answers."""
    return has_rollouts(config) or samples_answers(config)
