"""The names of a run's metrics: torchtitan's own where it has one, else `refine/`, `rollout/` and `timing/`. docs/metrics.md lists them.

`metrics.jsonl`, TensorBoard and Weights & Biases have the same names.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from refine_titan.files.json_lines import DamagedLines, read_columns

LOSS = "loss_metrics/global_avg_loss"
LARGEST_LOSS = "loss_metrics/global_max_loss"
THROUGHPUT = "throughput(tps)"
STEP_SECONDS = "timing/total"
TOKENS_PER_SECOND = "timing/tokens_per_second"
# What begins the metrics of `validation.jsonl`, and the seconds that an evaluation took.
VALIDATION = "validation_metrics/"
VALIDATION_SECONDS = "timing/validation"

# The key under which a metric stands in lines that were written before it had its name; `seconds.total` is `total` of the object `seconds`.
# A run that was begun then goes on, and its report shows both parts.
EARLIER_NAMES = {
    LOSS: "loss",
    "lr": "learning_rate",
    "tflops": "tflops_per_rank",
    "memory/max_active(GiB)": "peak_memory_gib",
    TOKENS_PER_SECOND: "tokens_per_second",
    "refine/ntp_loss": "ntp_loss",
    "refine/pg_loss": "pg_loss",
    "refine/kl": "kl",
    "refine/clip_fraction": "clip_fraction",
    "refine/advantage_std": "advantage_std",
    "refine/skipped_updates": "skipped_updates",
    "refine/weight_version": "weight_version",
    "refine/answer_loss": "answer_loss",
    "refine/answer_pg_loss": "answer_pg_loss",
    "refine/answer_tokens": "answer_tokens",
    "refine/outer_grad_norm": "outer_grad_norm",
    "rollout/reward_mean": "reward_mean",
    "rollout/reward_std": "reward_std",
    **{f"rollout/reward_{name}_mean": f"reward_{name}_mean" for name in ("cosine", "binary", "hybrid")},
    "rollout/match_mean": "match_mean",
    "rollout/entropy": "rollout_entropy",
    "rollout/logprob_gap": "logprob_gap",
    "rollout/logprob_gap_max": "logprob_gap_max",
    "rollout/importance_weight_mean": "importance_weight_mean",
    "rollout/prefilled_tokens": "prefilled_tokens",
    "rollout/task_reward": "task_reward",
    "rollout/task_reward_std": "task_reward_std",
    "rollout/answer_logprob_gap_max": "answer_logprob_gap_max",
}
TIMING = "timing/"


def read_metrics(path: Path, names: Sequence[str], damaged: DamagedLines) -> dict[str, np.ndarray]:
    """Reads metrics of every step of a `metrics.jsonl`, under whichever name a line has them.

    Args:
        damaged: gets the lines that cannot be read.

    Returns:
        For `step` and each name the values `[n]` in float64, NaN where a line has none.
    """
    return read_columns(path, names, damaged, {name: earlier for name in names if (earlier := earlier_name(name)) is not None})


def validation_name(name: str) -> str:
    """The present name of a field of `validation.jsonl`; earlier lines have the mean loss as `perplexity/LENGTH`."""
    if name == "seconds":
        return VALIDATION_SECONDS
    if name == "perplexity" or name.startswith("perplexity/"):
        return f"{VALIDATION}loss"
    return name if name.startswith((VALIDATION, TIMING)) else f"{VALIDATION}{name}"


def is_stage(name: str) -> bool:
    """Whether a metric is the seconds of a stage of the step."""
    return name.startswith(TIMING) and name not in (STEP_SECONDS, TOKENS_PER_SECOND)


def earlier_name(name: str) -> str | None:
    """The key under which earlier lines have a metric, if they have it under another one."""
    if is_stage(name) or name == STEP_SECONDS:
        return f"seconds.{name.removeprefix(TIMING)}"
    return EARLIER_NAMES.get(name)
