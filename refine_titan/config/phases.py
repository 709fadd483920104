"""Says which steps and samples a run consists of: its phase, objective and outer step decide it together."""

from refine_titan.config.sections import JobConfig


def has_inner_steps(config: JobConfig) -> bool:
    """Whether `refine.objective` trains on the documents or prompts of a batch."""
    return config.refine.phase != "posttrain" or config.posttrain.inner


def has_rollouts(config: JobConfig) -> bool:
    """Whether the steps of a batch begin with rollouts."""
    return config.refine.objective == "refine" and has_inner_steps(config)


def samples_answers(config: JobConfig) -> bool:
    """Whether the outer step samples answers and rewards them."""
    return config.refine.phase == "posttrain" and config.posttrain.outer == "reward"


def needs_engine(config: JobConfig) -> bool:
    """Whether a run samples rollouts or answers, and so needs an engine."""
    return has_rollouts(config) or samples_answers(config)


def optimizer_steps_on_rollouts(config: JobConfig) -> int:
    """Most optimizer steps on a batch's rollouts, which the weights before the first of these steps sample."""
    if config.refine.phase == "ttt":
        return min(config.ttt.steps, -(-config.ttt.batch_size // config.ttt.mini_batch_size))
    return config.refine.num_mini_batches
