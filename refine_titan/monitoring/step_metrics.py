"""Sums up one training step over microbatches, mini-batches and ranks, and computes its metrics."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.tools.utils import device_module

from refine_kernels.packing import on_device, on_host
from refine_titan.config.sections import Refine
from refine_titan.monitoring.metric_names import LARGEST_LOSS, LOSS, STEP_SECONDS, TIMING, TOKENS_PER_SECOND
from refine_titan.objective.rewards import REWARDS, RewardInputs

SUMS = (
    "nll",
    "labels",
    "policy_loss",
    "policy_tokens",
    "clipped",
    "kl",
    "kl_penalty",
    "rollout_entropy",
    "rollouts",
    "reward",
    "reward_squared",
    "advantage",
    "advantage_squared",
    "matches",
    "rollout_tokens",
    "gap",
    "tokens",
    "prefilled_tokens",
    "importance_weight",
    "answer_nll",
    "answer_tokens",
    "answers",
    "answer_policy_loss",
    "task_reward",
    "task_reward_squared",
    *(f"reward_{name}" for name in REWARDS),
)


class StepMetrics:
    """Collects the sums of a step, then reduces them over the ranks once."""

    def __init__(self):
        self.sums: dict[str, float | torch.Tensor] = dict.fromkeys(SUMS, 0.0)
        self.largest_gaps: list[torch.Tensor] = []
        self.largest_answer_gaps: list[torch.Tensor] = []
        self.grad_norms: list[float] = []
        self.outer_grad_norms: list[float] = []
        self.skipped_updates = 0
        self._host_seconds: dict[str, float] = defaultdict(float)
        self._device_stages: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._begin = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time of a stage, with its work on the device. On a GPU it is the time between two events, for which nothing waits."""
        if torch.cuda.is_available():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._device_stages.append((name, begin, end))
        else:
            begin = time.perf_counter()
            yield
            self._host_seconds[name] += time.perf_counter() - begin

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of each stage so far. A GPU must have done their work."""
        seconds = defaultdict(float, self._host_seconds)
        for name, begin, end in self._device_stages:
            seconds[name] += begin.elapsed_time(end) / 1000
        return seconds

    @contextmanager
    def outer_step(self) -> Iterator[None]:
        """Collects the gradient norms inside as those of the outer step of post-training."""
        inner, self.grad_norms = self.grad_norms, self.outer_grad_norms
        yield
        self.grad_norms = inner

    def add(self, **sums: float | torch.Tensor) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value

    def add_gap(self, engine_logprobs: torch.Tensor, trainer_logprobs: torch.Tensor) -> None:
        """Adds the gap between the log-probabilities that engine and trainer give to the same rollout tokens."""
        gap = (engine_logprobs - trainer_logprobs.detach()).abs()
        self.add(gap=gap.sum())
        self.largest_gaps.append(gap.max())

    def add_answer_gap(self, engine_logprobs: torch.Tensor, trainer_logprobs: torch.Tensor) -> None:
        """Adds the gap between the log-probabilities that engine and trainer give to the same answer tokens."""
        self.largest_answer_gaps.append((engine_logprobs - trainer_logprobs).abs().max())

    @torch.no_grad()
    def add_builtin_rewards(self, inputs: RewardInputs) -> None:
        """Adds every built-in reward of this rank's rollouts, so that runs with different rewards can be compared."""
        self.add(**{f"reward_{name}": reward(inputs).sum() for name, reward in REWARDS.items()})

    def result(self, refine: Refine, group: dist.ProcessGroup | None) -> dict[str, Any]:
        """Returns the metrics of the step over all ranks by name (`metric_names.py`), for JSON; None where the objective has none."""
        gaps = [torch.stack(found).max() if found else 0.0 for found in (self.largest_gaps, self.largest_answer_gaps)]
        numbers = _read([*(self.sums[name] for name in SUMS), *gaps])
        own_loss = self._loss(dict(zip(SUMS, numbers)), refine)
        read = torch.tensor([*numbers, -math.inf if own_loss is None else own_loss], dtype=torch.float64)
        sizes = [len(SUMS), len(gaps) + 1]
        if group is not None:
            device = torch.device(device_module.current_device()) if torch.cuda.is_available() else torch.device("cpu")
            reduced = on_device(read, device)
            sums, maxima = reduced.split(sizes)  # parts of one tensor, which comes back in one copy
            dist.all_reduce(sums, group=group)
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
            (read,) = on_host(reduced)
        values, maxima = read.split(sizes)
        s = dict(zip(SUMS, values.tolist()))
        largest_gap, largest_answer_gap, largest_loss = maxima.tolist()
        total_seconds = time.perf_counter() - self._begin
        metrics = {
            LOSS: self._loss(s, refine),
            LARGEST_LOSS: largest_loss if math.isfinite(largest_loss) else None,
            "grad_norm": _finite_mean(self.grad_norms or self.outer_grad_norms),
            "refine/ntp_loss": _ratio(s["nll"], s["labels"]),
            "refine/skipped_updates": self.skipped_updates,
            **_rollout_metrics(s, largest_gap),
            TOKENS_PER_SECOND: s["tokens"] / total_seconds,
            **{f"{TIMING}{name}": round(value, 4) for name, value in self.seconds.items()},
            STEP_SECONDS: round(total_seconds, 4),
        }
        return metrics | (self._outer_result(s, largest_answer_gap) if self.outer_grad_norms else {})

    def _loss(self, s: dict[str, float], refine: Refine) -> float | None:
        """The loss of sums `s`: that of the inner steps, or of the outer step where there are none; None if the sums have no token."""
        if not s["labels"]:
            if self.grad_norms:
                return None
            return s["answer_policy_loss"] / s["answers"] if s["answers"] else _ratio(s["answer_nll"], s["answer_tokens"])
        loss = refine.ntp_coef * (s["nll"] / s["labels"])
        if s["policy_tokens"]:
            tokens = s["policy_tokens"]
            penalty = refine.kl_coef * s["kl_penalty"] / tokens - refine.entropy_coef * (s["rollout_entropy"] / tokens)
            loss = loss + refine.rl_coef * (s["policy_loss"] / tokens) + penalty
        return loss

    def _outer_result(self, s: dict[str, float], largest_gap: float) -> dict[str, Any]:
        """Returns the metrics of the outer step of post-training."""
        result = {"refine/answer_tokens": int(s["answer_tokens"]), "refine/outer_grad_norm": _finite_mean(self.outer_grad_norms)}
        if not s["answers"]:
            return result | {"refine/answer_loss": s["answer_nll"] / s["answer_tokens"]}
        return result | {
            "refine/answer_pg_loss": s["answer_policy_loss"] / s["answers"],
            "rollout/task_reward": s["task_reward"] / s["answers"],
            "rollout/task_reward_std": _std(s["task_reward"], s["task_reward_squared"], s["answers"]),
            "rollout/answer_logprob_gap_max": largest_gap,
        }


def _rollout_metrics(s: dict[str, float], largest_gap: float) -> dict[str, Any]:
    """The metrics of a step's rollouts; None where it has none."""
    n, tokens, policy_tokens = s["rollouts"], s["rollout_tokens"], s["policy_tokens"]
    has_any = bool(n)
    return {
        "refine/pg_loss": _ratio(s["policy_loss"], policy_tokens),
        "refine/clip_fraction": _ratio(s["clipped"], policy_tokens),
        "refine/kl": _ratio(s["kl"], policy_tokens),
        "refine/advantage_std": _std(s["advantage"], s["advantage_squared"], n),
        "rollout/reward_mean": _ratio(s["reward"], n),
        "rollout/reward_std": _std(s["reward"], s["reward_squared"], n),
        **{f"rollout/reward_{name}_mean": _ratio(s[f"reward_{name}"], n) for name in REWARDS},
        "rollout/match_mean": _ratio(s["matches"], tokens),
        "rollout/entropy": _ratio(s["rollout_entropy"], policy_tokens),
        "rollout/logprob_gap": _ratio(s["gap"], tokens),
        "rollout/logprob_gap_max": largest_gap if has_any else None,
        "rollout/importance_weight_mean": _ratio(s["importance_weight"], tokens),
        "rollout/prefilled_tokens": int(s["prefilled_tokens"]) if has_any else None,
    }


def _read(numbers: list[float | torch.Tensor]) -> list[float]:
    """The numbers on the host; those of a device come over in one copy."""
    places = defaultdict(list)
    for i, number in enumerate(numbers):
        if isinstance(number, torch.Tensor):
            places[number.device].append(i)
    read = list(numbers)
    for own in places.values():
        (found,) = on_host(torch.stack([numbers[i].detach().double() for i in own]))
        for i, number in zip(own, found.tolist()):
            read[i] = number
    return read


def _finite_mean(norms: list[float]) -> float | None:
    finite = [norm for norm in norms if math.isfinite(norm)]
    return sum(finite) / len(finite) if finite else None


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None


def _std(total: float, total_of_squares: float, count: float) -> float | None:
    if not count:
        return None
    return math.sqrt(max(total_of_squares / count - (total / count) ** 2, 0.0))
