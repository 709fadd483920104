"""Evaluates the tasks of `[evaluation]` during training, every `validation.freq` steps, as torchtitan's validator.

The ranks share the samples, with the model sharded as in training; those that share every sequence's heads (tensor parallelism) evaluate
the same samples. All ranks make equally many forwards, as sharded parameters are gathered in every one. Rank 0 writes. The global
random generator is not used, so that training continues as it would without evaluation.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.components.validate import BaseValidator
from torchtitan.config import JobConfig as TitanJobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type

from refine_titan.benchmarks.samples import Sample
from refine_titan.distributed.precision import compute_precision
from refine_titan.evaluation import perplexity
from refine_titan.evaluation.prompts import AnswerProtocol
from refine_titan.evaluation.shared_scores import SharedScores
from refine_titan.evaluation.work import load_tasks, plan_work
from refine_titan.inference import stop_tokens
from refine_titan.models.sizes import resolve_args
from refine_titan.monitoring.metric_names import VALIDATION, VALIDATION_SECONDS
from refine_titan.monitoring.run_folder import JsonLines
from refine_titan.monitoring.run_monitor import memory_metrics
from refine_titan.report.results import perplexity_of
from refine_titan.terminal import lines_of_parts

VALIDATION_FILE = "validation.jsonl"
# Columns of a line beside the log's time, which takes 17: together as many as a step's line has at most.
LOG_COLUMNS = 83


class PeriodicEvaluation(BaseValidator):
    """A torchtitan validator that evaluates the tasks of `[evaluation]`.

    Each evaluation writes one line to `validation.jsonl`, and the same numbers to the run's curves: the mean score of every task and
    length, and of the documents of `perplexity` loss, perplexity and next-token accuracy.

    Raises:
        UserError: if a task cannot be loaded.
    """

    def __init__(
        self,
        job_config: TitanJobConfig,
        tokenizer: BaseTokenizer,
        parallel_dims: ParallelDims,
        metrics_processor: MetricsProcessor,
    ):
        super().__init__(job_config)
        self.at_start = job_config.validation.at_start
        self.metrics_processor = metrics_processor
        # The ranks that share the samples: those of data and context parallelism.
        self.group = parallel_dims.get_mesh("loss").get_group() if parallel_dims.dp_cp_enabled else None
        self.amp = compute_precision(job_config, parallel_dims)
        self.vocab_size = resolve_args(job_config.model).vocab_size
        ends = stop_tokens(job_config, tokenizer)
        protocol = AnswerProtocol.from_settings(job_config.evaluation, job_config.training.seq_len, ends)
        self.work = plan_work(load_tasks(job_config, tokenizer), protocol, tokenizer)
        self.shared = SharedScores(self.work, protocol, tokenizer, job_config.evaluation)
        self.path = Path(job_config.job.dump_folder, VALIDATION_FILE)
        self.last_step = -1
        self._file: JsonLines | None = None
        for note in self.work.notes:
            logger.info(f"Evaluation during training: {note}")
        for name, reasons in self.work.skipped.items():
            counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
            logger.warning(f"Evaluation during training: {name} has rows that are not evaluated ({counts})")
        num_cut = sum(prompt.cut_tokens > 0 for prompt in self.work.prompts)
        if num_cut:
            logger.warning(f"Evaluation during training: {num_cut} prompts are longer than allowed and are cut")

    def begin(self, resume_step: int | None) -> None:
        """Opens `validation.jsonl`, and keeps its lines up to `resume_step`, none if the run starts. Every rank must call this."""
        device = torch.device(device_type)
        last_step = torch.zeros(1, dtype=torch.int64, device=device)
        if dist.get_rank() == 0:
            self._file = JsonLines(self.path, -1 if resume_step is None else resume_step)
            last_step += self._file.last_step
        dist.broadcast(last_step, src=0)
        self.last_step = int(last_step)

    def catch_up(self, model_parts: list[nn.Module], step: int) -> None:
        """Evaluates after `step` if the run was killed between that step's checkpoint and its evaluation; after step 0, where the settings
        ask for it, before the first step."""
        is_due = self.at_start if step == 0 else self.should_validate(step)
        if step > self.last_step and is_due:
            self.validate(model_parts, step)

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        [model] = model_parts
        begin = time.perf_counter()
        model.eval()
        try:
            scores = self._evaluate(model)
        finally:
            model.train()
        self.last_step = step
        if self._file is None:
            return
        scores, memory = mean_scores(self.shared.samples, scores), self.metrics_processor.device_memory_monitor
        used = {f"{VALIDATION}{name}": value for name, value in memory_metrics(memory.get_peak_stats()).items() if "max" in name}
        memory.reset_peak_stats()
        record = {"step": step, **scores, **used, VALIDATION_SECONDS: round(time.perf_counter() - begin, 4)}
        self._file.write(record)
        self.metrics_processor.logger.log({name: value for name, value in record.items() if name != "step"}, step)
        when = f"after step {step}" if step else "before the first step"
        numbers = [f"{name.removeprefix(VALIDATION)} {value:.4f}" for name, value in scores.items()]
        for line in lines_of_parts([f"Evaluation {when}, {record[VALIDATION_SECONDS]:.1f} s:", *numbers], LOG_COLUMNS):
            logger.info(line)

    @property
    def problem(self) -> str | None:
        """Says why lines of `validation.jsonl` wait to be written; None if none do."""
        if self._file is None:
            return None
        self._file.try_again()
        return self._file.problem

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _evaluate(self, model: nn.Module) -> list[list[float]]:
        """Returns the score and accuracy of each of `self.shared.samples`: this rank's share, and those of the other ranks."""
        rank, size = (0, 1) if self.group is None else (dist.get_rank(self.group), dist.get_world_size(self.group))
        device, alone = torch.device(device_type), dist.get_world_size() == 1
        scores = self.shared.of_rank(model, self.vocab_size, device, lambda: self.amp, rank, size, ends_early=alone)
        if self.group is not None:
            # Each score is added to zeros only, so the sum is exact.
            scores = scores.to(device)
            dist.all_reduce(scores, group=self.group)
        return scores.tolist()


def mean_scores(samples: Sequence[Sample], scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """Computes the mean score of every task and length, and loss, perplexity and next-token accuracy of documents, by metric.

    Args:
        scores: rows of `SharedScores.of_rank`.
    """
    values: dict[str, list[float]] = defaultdict(list)
    for sample, (score, accuracy) in zip(samples, scores, strict=True):
        if sample.benchmark == perplexity.TASK:
            values["loss"].append(score)
            values["accuracy"].append(accuracy)
        else:
            values[f"{sample.benchmark}/{sample.task}{'' if sample.length is None else f'/{sample.length}'}"].append(score)
    means = {name: sum(found) / len(found) for name, found in values.items()}
    if "loss" in means:
        means["perplexity"] = perplexity_of(means["loss"])
    return {f"{VALIDATION}{name}": mean for name, mean in sorted(means.items())}


def build_validator(
    job_config: TitanJobConfig,
    tokenizer: BaseTokenizer,
    parallel_dims: ParallelDims,
    metrics_processor: MetricsProcessor,
    **_: Any,
) -> PeriodicEvaluation:
    """Builds the validator; torchtitan's trainer calls this."""
    return PeriodicEvaluation(job_config, tokenizer, parallel_dims, metrics_processor)
