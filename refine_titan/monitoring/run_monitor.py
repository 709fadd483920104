"""Writes and shows everything of a run but checkpoints: run folder, metrics, rollouts, progress, summary."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torchtitan.components.metrics import DeviceMemStats
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.tools.logging import logger

from refine_kernels.packing import on_host
from refine_titan.config.sections import JobConfig
from refine_titan.data.dataloader import DataProgress, TokenBatch
from refine_titan.errors import UserError
from refine_titan.files.json_lines import DamagedLines, complete_lines
from refine_titan.hub.names import with_names
from refine_titan.monitoring.curves import CurvesProcessor
from refine_titan.monitoring.metric_names import LOSS, THROUGHPUT, TOKENS_PER_SECOND, read_metrics
from refine_titan.monitoring.resumed_settings import parts_to_begin_anew, record_new_beginning, resumed_settings
from refine_titan.monitoring.run_folder import JsonLines, checkpoints_of, write_run_files
from refine_titan.monitoring.step_line import StepLine, fixed
from refine_titan.monitoring.step_metrics import StepMetrics
from refine_titan.monitoring.token_texts import token_texts
from refine_titan.objective.extensions import packages_of
from refine_titan.progress import Progress
from refine_titan.rollout.engine import Rollouts
from refine_titan.terminal import columns, show

# Most rollouts of a step that rank 0 writes down, and most tokens of each prefix.
SAMPLED_ROLLOUTS = 8
PREFIX_TAIL = 64
# Metrics that the summary compares between the run's beginning and its end.
SUMMARY = (
    ("refine/ntp_loss", "NTP loss"),
    ("rollout/match_mean", "rollout tokens that match"),
    ("rollout/reward_mean", "reward"),
    ("refine/answer_loss", "answer loss"),
    ("rollout/task_reward", "task reward"),
)


class RunMonitor:
    """Writes and shows on rank 0; on other ranks it only takes part in reductions."""

    def __init__(self, config: JobConfig, tokenizer: BaseTokenizer, metrics_processor: CurvesProcessor):
        self.config = config
        self.tokenizer = tokenizer
        self.metrics_processor = metrics_processor
        self.folder = Path(config.job.dump_folder)
        self.is_writer = dist.get_rank() == 0
        self.metrics_file: JsonLines | None = None
        self.rollouts_file: JsonLines | None = None
        self.progress: Progress | None = None
        self.line = StepLine(config.training.steps, config.metrics.log_stages)
        self._width = columns()
        self._has_written_run_files = False
        self._begins_anew = False
        self._sampled = self._sampled_answers = 0

    def begin(self, resume_step: int | None) -> None:
        """Opens the run folder to go on after `resume_step`, or anew.

        Raises:
            UserError: if the folder holds a run that cannot go on with these settings, or records that this run cannot go on from.
        """
        self.first_step = resume_step or 0
        self._begins_anew = bool(parts_to_begin_anew(self.config, self.first_step))
        if resume_step:
            for line in resumed_settings(self.config, resume_step):
                if self.is_writer:
                    logger.warning(line)
        elif any(complete_lines(self.folder / "metrics.jsonl")):
            checkpoint, earlier = self.config.checkpoint, checkpoints_of(self.folder)
            # If both runs write checkpoints into the same folder, the first one was killed before its first checkpoint: it starts again.
            if not checkpoint.enable or checkpoint.load_only or earlier != checkpoint.folder:
                is_elsewhere = checkpoint.enable and earlier not in (None, checkpoint.folder)
                place = f", but for checkpoint.folder = '{earlier}'" if is_elsewhere else ""
                raise UserError(
                    f"{self.folder} holds the records of a run without a checkpoint to go on from{place}, and they would be "
                    "overwritten; give another job.dump_folder or remove it"
                )
        if self.is_writer:
            self.metrics_processor.begin(-1 if resume_step is None else resume_step)
            self.metrics_file = JsonLines(self.folder / "metrics.jsonl", self.first_step)
            self.rollouts_file = JsonLines(self.folder / "rollouts.jsonl", self.first_step)
            at = {"done": self.first_step, "stream": sys.stdout, "seconds_between_lines": None}  # each logged step has a line
            self.progress = Progress("training", self.config.training.steps, "steps", **at)

    def show_data(self, description: Sequence[str]) -> None:
        """Says what the run reads, and what it leaves out and why."""
        if self.is_writer:
            for line in description:
                logger.info(f"Data: {line}")

    def record_rollouts(
        self,
        step: int,
        batch: TokenBatch,
        starts: Sequence[int],
        rollouts: Rollouts,
        truth_nk: torch.Tensor,
        reward_n: torch.Tensor,
        advantages_n: torch.Tensor,
    ) -> None:
        """Writes the first rollouts of a step as text."""
        room = SAMPLED_ROLLOUTS - self._sampled
        if self.rollouts_file is None or room <= 0:
            return
        found = on_host(batch.tokens_T, *(x[:room] for x in (rollouts.tokens_nk, truth_nk, reward_n, advantages_n)))
        tokens, *results = (x.tolist() for x in found)
        for start, sampled, true, reward, advantage in zip(starts, *results):
            self.rollouts_file.write(
                self._prefix(step, batch, tokens, start)
                | {
                    "rollout": self.tokenizer.decode(sampled),
                    "truth": self.tokenizer.decode(true),
                    "rollout_tokens": sampled,
                    "truth_tokens": true,
                    "rollout_texts": token_texts(self.tokenizer, sampled),
                    "truth_texts": token_texts(self.tokenizer, true),
                    "reward": reward,
                    "advantage": advantage,
                    "engine": rollouts.engine,
                    "weight_version": rollouts.weight_version,
                }
            )
            self._sampled += 1

    def record_answers(
        self,
        step: int,
        batch: TokenBatch,
        starts: Sequence[int],
        rollouts: Rollouts,
        texts: Sequence[str],
        references: Sequence[Sequence[str]],
        reward_n: torch.Tensor,
        advantages_n: torch.Tensor,
    ) -> None:
        """Writes the first sampled answers of a post-training step as text, with `"outer": true`."""
        room = SAMPLED_ROLLOUTS - self._sampled_answers
        if self.rollouts_file is None or room <= 0:
            return
        found = on_host(batch.tokens_T, *(x[:room] for x in (rollouts.tokens_nk, reward_n, advantages_n)))
        tokens, *results = (x.tolist() for x in found)
        for start, text, answers, sampled, reward, advantage in zip(starts, texts, references, *results):
            self.rollouts_file.write(
                self._prefix(step, batch, tokens, start)
                | {
                    "outer": True,
                    "rollout": text,
                    "truth": answers[0],
                    "answers": list(answers),
                    "rollout_tokens": sampled,
                    "reward": reward,
                    "advantage": advantage,
                    "engine": rollouts.engine,
                    "weight_version": rollouts.weight_version,
                }
            )
            self._sampled_answers += 1

    def _prefix(self, step: int, batch: TokenBatch, tokens: list[int], start: int) -> dict[str, Any]:
        """Describes where a rollout at `start` of the trunk leaves its document."""
        document = max(d for d, begin in enumerate(batch.cu_seqlens[:-1]) if begin < start)
        begin = batch.cu_seqlens[document]
        return {
            "step": step,
            "document": batch.document_names[document],
            "position": start - begin,
            "prefix_tail": self.tokenizer.decode(tokens[max(begin, start - PREFIX_TAIL) : start]),
        }

    def log_step(
        self,
        step: int,
        metrics: StepMetrics,
        learning_rate: float,
        weight_version: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        """Reduces a finished step over the ranks of `group`; writes and shows it."""
        self._sampled = self._sampled_answers = 0
        processor = self.metrics_processor
        result = metrics.result(self.config.refine, group)
        memory = processor.device_memory_monitor
        ranks = dist.get_world_size()
        record = {
            "step": step,
            **result,
            "lr": learning_rate,
            "refine/weight_version": weight_version,
            THROUGHPUT: result[TOKENS_PER_SECOND] / ranks,
            "tflops": result[TOKENS_PER_SECOND] * processor.num_flops_per_token / ranks / 1e12,
            **processor.time_metrics(),
            **memory_metrics(memory.get_peak_stats()),
        }
        if processor.gpu_peak_flops is not None:
            record["mfu(%)"] = 100 * record["tflops"] * 1e12 / processor.gpu_peak_flops
        memory.reset_peak_stats()
        if self.metrics_file is None:
            return
        if not self._has_written_run_files:
            # Only after a step has succeeded: if a start fails, the description of the earlier run stays.
            if self._begins_anew:
                record_new_beginning(self.folder, self.first_step)
            refine = self.config.refine
            write_run_files(self.folder, with_names(self.config.to_dict()), packages_of(refine.reward, refine.selection))
            self._has_written_run_files = True
        self.metrics_file.write(record)
        should_log = processor.should_log(step)
        self.progress.advance(others=[fixed("loss", record[LOSS], 4)])
        if should_log:
            self.progress.print(self.line.text(step, record, self.progress.time_left, self._width))
            processor.logger.log({name: value for name, value in record.items() if name != "step"}, step)

    @property
    def problem(self) -> str | None:
        """Says which file of the run lacks lines that could not be written; None if none does."""
        files = [file for file in (self.metrics_file, self.rollouts_file) if file is not None]
        for file in files:
            file.try_again()
        return next((file.problem for file in files if file.problem is not None), None)

    def finish(self, last_step: int, skipped_updates: int, data: DataProgress) -> None:
        """Closes the display and prints the summary."""
        if not self.is_writer:
            return
        self.progress.close()
        steps = self.config.training.steps
        if self.first_step >= steps:
            longer = "more --training.epochs" if self.config.training.epochs else "a larger --training.steps"
            logger.warning(
                f"Nothing was trained: {self.folder} already holds this run at step {self.first_step} of {steps}. Remove the "
                f"folder, choose another with --job.dump_folder, or go on with {longer}"
            )
        show(self.summary(last_step, skipped_updates, data))

    def summary(self, last_step: int, skipped_updates: int, data: DataProgress) -> str:
        """Compares the first fifth of the run with the last, and says where its files are."""
        path = self.folder / "metrics.jsonl"
        columns = read_metrics(path, [name for name, _ in SUMMARY], DamagedLines(path))
        num_steps = len(columns["step"])
        lines = [f"Run of {num_steps} steps in {self.folder}"]
        fifth = max(num_steps // 5, 1)
        for name, label in SUMMARY:
            first, last = (part[~np.isnan(part)] for part in (columns[name][:fifth], columns[name][-fifth:]))
            if len(first) and len(last):
                a, b = first.mean(), last.mean()
                what = f"mean of the first and the last {fifth} steps" if fifth > 1 else "first and last step"
                lines.append(_row(label, f"{a:.4f} -> {b:.4f}  ({what})"))
        skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(data.skipped.items())) or "none"
        share = f", {data.streams} of {data.num_streams} streams" if data.num_streams > data.streams else ""
        passes = f"{data.passes} whole passes" if data.passes != 1 else "1 whole pass"
        lines.append(_row("documents", f"{data.documents_read} read in the first pass{share}, skipped: {skipped}; {passes}"))
        if data.cut:
            amounts = ", ".join(f"{count} {what}" for what, count in sorted(data.cut.items()))
            lines.append(_row("cut for their length", f"{amounts} in the first pass{share}"))
        if skipped_updates:
            lines.append(_row("optimizer steps skipped", f"{skipped_updates} (gradient norm not finite)"))
        checkpoint = self.config.checkpoint
        if checkpoint.enable and not checkpoint.load_only:
            lines.append(_row("checkpoint", f"{self.folder / checkpoint.folder}/step-{last_step}"))
        tensorboard = f", {self.config.metrics.save_tb_folder} (TensorBoard)" if self.config.metrics.enable_tensorboard else ""
        validation = ", validation.jsonl" if self.config.validation.enable else ""
        lines.append(_row("to read", f"metrics.jsonl, rollouts.jsonl{validation}{tensorboard}"))
        return "\n".join(lines)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.close()
        for file in (self.metrics_file, self.rollouts_file):
            if file is not None:
                file.close()


def memory_metrics(stats: DeviceMemStats) -> dict[str, float]:
    """torchtitan's metrics of a device's memory since the last reset; on a CPU, both peaks are that of the process's resident memory."""
    metrics = {
        "memory/max_active(GiB)": round(stats.max_active_gib, 4),
        "memory/max_active(%)": round(stats.max_active_pct, 2),
        "memory/max_reserved(GiB)": round(stats.max_reserved_gib, 4),
        "memory/max_reserved(%)": round(stats.max_reserved_pct, 2),
    }
    if torch.cuda.is_available():
        metrics |= {"memory/num_alloc_retries": stats.num_alloc_retries, "memory/num_ooms": stats.num_ooms}
    return metrics


def _row(label: str, text: str) -> str:
    return f"  {label + ':':<27} {text}"
