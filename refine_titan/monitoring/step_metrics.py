"""Sums up one training step over microbatches, mini-batches and ranks, and computes its metrics."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torchtitan.tools.utils import device_module

from refine_kernels.packing import on_device, on_host
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

    def result(self, refine, group: dist.ProcessGroup | None) -> dict:
        """Returns the metrics of the step over all ranks, for JSON; None where the objective has none."""
        gaps = [torch.stack(found).max() if found else 0.0 for found in (self.largest_gaps, self.largest_answer_gaps)]
        read = torch.tensor(_read([*(self.sums[name] for name in SUMS), *gaps]), dtype=torch.float64)
        sizes = [len(SUMS), len(gaps)]
        if group is not None:
            device = torch.device(device_module.current_device()) if torch.cuda.is_available() else torch.device("cpu")
            reduced = on_device(read, device)
            sums, maxima = reduced.split(sizes)  # parts of one tensor, which comes back in one copy
            dist.all_reduce(sums, group=group)
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
            (read,) = on_host(reduced)
        values, largest_gaps = read.split(sizes)
        s = dict(zip(SUMS, values.tolist()))
        largest_gap, largest_answer_gap = largest_gaps.tolist()
        seconds = {name: round(value, 4) for name, value in self.seconds.items()}
        seconds["total"] = round(time.perf_counter() - self._begin, 4)
        # In post-training there may be no inner steps.
        ntp_loss = s["nll"] / s["labels"] if s["labels"] else None
        metrics = {
            "ntp_loss": ntp_loss,
            "pg_loss": None,
            "loss": None if ntp_loss is None else refine.ntp_coef * ntp_loss,
            "grad_norm": _finite_mean(self.grad_norms),
            "skipped_updates": self.skipped_updates,
            "tokens_per_second": s["tokens"] / seconds["total"],
            "seconds": seconds,
        }
        if s["rollouts"]:
            n, tokens = s["rollouts"], s["policy_tokens"]
            pg_loss, entropy = s["policy_loss"] / tokens, s["rollout_entropy"] / tokens
            penalty = refine.kl_coef * s["kl_penalty"] / tokens - refine.entropy_coef * entropy
            metrics |= {
                "pg_loss": pg_loss,
                "loss": metrics["loss"] + refine.rl_coef * pg_loss + penalty,
                "reward_mean": s["reward"] / n,
                "reward_std": _std(s["reward"], s["reward_squared"], n),
                **{f"reward_{name}_mean": s[f"reward_{name}"] / n for name in REWARDS},
                "advantage_std": _std(s["advantage"], s["advantage_squared"], n),
                "match_mean": s["matches"] / s["rollout_tokens"],
                "clip_fraction": s["clipped"] / tokens,
                "kl": s["kl"] / tokens,
                "rollout_entropy": entropy,
                "logprob_gap": s["gap"] / s["rollout_tokens"],
                "logprob_gap_max": largest_gap,
                "importance_weight_mean": s["importance_weight"] / s["rollout_tokens"],
                "prefilled_tokens": int(s["prefilled_tokens"]),
            }
        else:
            absent = (
                "reward_mean",
                "reward_std",
                *(f"reward_{name}_mean" for name in REWARDS),
                "advantage_std",
                "match_mean",
                "clip_fraction",
                "kl",
                "rollout_entropy",
                "logprob_gap",
                "logprob_gap_max",
                "importance_weight_mean",
                "prefilled_tokens",
            )
            metrics |= dict.fromkeys(absent)
        if self.outer_grad_norms:
            metrics |= self._outer_result(s, largest_answer_gap)
            if metrics["loss"] is None:  # no inner steps
                metrics |= {"loss": metrics.get("answer_loss", metrics.get("answer_pg_loss"))}
                metrics |= {"grad_norm": metrics["outer_grad_norm"]}
        return metrics

    def _outer_result(self, s: dict[str, float], largest_gap: float) -> dict:
        """Returns the metrics of the outer step of post-training."""
        result = {"answer_tokens": int(s["answer_tokens"]), "outer_grad_norm": _finite_mean(self.outer_grad_norms)}
        if not s["answers"]:
            return result | {"answer_loss": s["answer_nll"] / s["answer_tokens"]}
        return result | {
            "answer_pg_loss": s["answer_policy_loss"] / s["answers"],
            "task_reward": s["task_reward"] / s["answers"],
            "task_reward_std": _std(s["task_reward"], s["task_reward_squared"], s["answers"]),
            "answer_logprob_gap_max": largest_gap,
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


def _std(total: float, total_of_squares: float, count: float) -> float:
    return math.sqrt(max(total_of_squares / count - (total / count) ** 2, 0.0))
