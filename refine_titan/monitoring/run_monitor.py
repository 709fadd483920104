"""Everything a run writes and shows besides checkpoints: run folder, metrics, rollouts, progress, summary."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torchtitan.tools.logging import logger

from refine_titan.checkpointing import resume_step
from refine_titan.data.dataloader import TokenBatch
from refine_titan.errors import UserError
from refine_titan.monitoring.progress import ProgressDisplay
from refine_titan.monitoring.run_folder import FolderLock, JsonLines, changed_settings, read_json_lines, write_run_files
from refine_titan.monitoring.step_metrics import StepMetrics
from refine_titan.rollout.engine import Rollouts

if TYPE_CHECKING:
    from refine_titan.trainer import RefineTrainer

# Rollouts of a step that rank 0 writes down, and tokens of their prefix.
SAMPLED_ROLLOUTS = 8
PREFIX_TAIL = 64
# Sections that may change on resume without a word.
FREE_SECTIONS = ("job.", "metrics.", "checkpoint.", "profiling.", "comm.", "training.steps", "training.gc", "parallelism.")


class RunMonitor:
    """Rank 0 writes and shows; other ranks only take part in reductions."""

    def __init__(self, trainer: "RefineTrainer"):
        self.trainer = trainer
        self.folder = Path(trainer.job_config.job.dump_folder)
        self.is_writer = dist.get_rank() == 0
        self.lock: FolderLock | None = None
        self.metrics_file: JsonLines | None = None
        self.rollouts_file: JsonLines | None = None
        self.progress: ProgressDisplay | None = None
        self._sampled = 0

    def begin(self) -> None:
        """Prepares the run folder for the step that training will resume from.

        Raises:
            UserError: if the folder cannot be written, another process trains in it, or its run has another model.
        """
        trainer = self.trainer
        config = trainer.job_config.to_dict()
        if self.is_writer:
            self.lock = FolderLock(self.folder)
        self.first_step = resume_step(trainer.checkpointer, trainer.job_config.checkpoint.load_step) or 0
        if self.first_step:
            changed = changed_settings(self.folder, config, lambda name: not name.startswith(FREE_SECTIONS))
            model = [change for change in changed if change.startswith("model.")]
            if model:
                raise UserError(
                    f"{self.folder} holds a run of another model ({'; '.join(model)}); give another job.dump_folder"
                )
            if changed and self.is_writer:
                logger.warning(f"Resuming with changed settings: {'; '.join(changed)}")
        if self.is_writer:
            write_run_files(self.folder, config)
            self.metrics_file = JsonLines(self.folder / "metrics.jsonl", self.first_step)
            self.rollouts_file = JsonLines(self.folder / "rollouts.jsonl", self.first_step)
            self.progress = ProgressDisplay(trainer.job_config.training.steps, self.first_step, logger)

    def sample_rollouts(
        self,
        batch: TokenBatch,
        microbatch: int,
        starts: tuple[int, ...],
        rollouts: Rollouts,
        truth_nk: torch.Tensor,
        reward_n: torch.Tensor,
        advantages_n: torch.Tensor,
    ) -> None:
        """Writes the first rollouts of a step in words."""
        if self.rollouts_file is None:
            return
        if microbatch == 0:
            self._sampled = 0
        decode = self.trainer.tokenizer.decode
        tokens = batch.tokens_T.tolist()
        for i, start in enumerate(starts[: SAMPLED_ROLLOUTS - self._sampled]):
            document = max(d for d, begin in enumerate(batch.cu_seqlens[:-1]) if begin < start)
            begin = batch.cu_seqlens[document]
            self.rollouts_file.write(
                {
                    "step": self.trainer.step,
                    "document": batch.document_names[document],
                    "position": start - begin,
                    "prefix_tail": decode(tokens[max(begin, start - PREFIX_TAIL) : start]),
                    "rollout": decode(rollouts.tokens_nk[i].tolist()),
                    "truth": decode(truth_nk[i].tolist()),
                    "rollout_tokens": rollouts.tokens_nk[i].tolist(),
                    "truth_tokens": truth_nk[i].tolist(),
                    "reward": float(reward_n[i]),
                    "advantage": float(advantages_n[i]),
                }
            )
            self._sampled += 1

    def log_step(self, step: int, metrics: StepMetrics) -> None:
        """Reduces a finished step over the ranks; writes and shows it."""
        trainer = self.trainer
        result = metrics.result(trainer.refine, trainer.dp_group)
        memory = trainer.metrics_processor.device_memory_monitor
        record = {"step": step, **result, "learning_rate": trainer.lr_schedulers.schedulers[0].get_last_lr()[0],
                  "peak_memory_gib": round(memory.get_peak_stats().max_active_gib, 4)}  # fmt: skip
        trainer.metrics_processor.data_loading_times.clear()
        if self.metrics_file is None:
            return
        self.metrics_file.write(record)
        should_log = trainer.metrics_processor.should_log(step)
        self.progress.update(step, record, print_line=should_log)
        if should_log:
            flat = {name: value for name, value in record.items() if isinstance(value, (int, float)) and name != "step"}
            flat |= {f"seconds/{name}": value for name, value in record["seconds"].items()}
            trainer.metrics_processor.logger.log(flat, step)

    def finish(self) -> None:
        """Closes the display and prints the summary."""
        trainer = self.trainer
        if not self.is_writer:
            return
        self.progress.close()
        steps = trainer.job_config.training.steps
        if self.first_step >= steps:
            logger.warning(
                f"Nothing was trained: {self.folder} already holds this run at step {self.first_step} of {steps}. Remove the "
                "folder, choose another with --job.dump_folder, or go on with a larger --training.steps"
            )
        print(self.summary(), flush=True)

    def summary(self) -> str:
        """First against last fifth of the run, and where everything lies."""
        trainer = self.trainer
        records = read_json_lines(self.folder / "metrics.jsonl")
        lines = [f"Run of {len(records)} steps, {trainer.ntokens_seen:,} tokens a rank, in {self.folder}"]
        fifth = max(len(records) // 5, 1)
        for name, label in (("ntp_loss", "NTP loss"), ("match_mean", "rollout tokens that match"), ("reward_mean", "reward")):
            first = [r[name] for r in records[:fifth] if r[name] is not None]
            last = [r[name] for r in records[-fifth:] if r[name] is not None]
            if first and last:
                a, b = sum(first) / len(first), sum(last) / len(last)
                lines.append(f"  {label + ':':<27} {a:.4f} -> {b:.4f}  (mean of first and last {fifth} steps)")
        stream = trainer.dataloader.stream
        skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(stream.skipped.items())) or "none"
        lines.append(f"  documents:                  {stream.documents_read} read in {stream.epoch} whole passes; skipped: {skipped}")
        if trainer.skipped_updates:
            lines.append(f"  optimizer steps skipped:    {trainer.skipped_updates} (gradient norm not finite)")
        if trainer.checkpointer.enable:
            lines.append(f"  checkpoint:                 {trainer.checkpointer.folder}/step-{trainer.step}")
        lines.append("  to read:                    metrics.jsonl, rollouts.jsonl, tb/ (TensorBoard)")
        return "\n".join(lines)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.close()
        for file in (self.metrics_file, self.rollouts_file):
            if file is not None:
                file.close()
        if self.lock is not None:
            self.lock.release()
