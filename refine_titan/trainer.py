"""The trainer: torchtitan's Trainer builds the model, optimizer, data and checkpoints and runs the loop. On every batch it runs
`steps/refine_step.py`, and in post-training `steps/outer_step.py` after it."""

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import astuple
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.train import Trainer

from refine_titan.checkpointing import (
    await_writing,
    checkpoint_this_step,
    explain_failed_writes,
    guard_dcp,
    is_checkpoint_due,
    keep_latest_whole,
    keep_settings_when_loading,
    newest_checkpoint,
    resume_step,
    write_description_with_checkpoints,
)
from refine_titan.config.batch_plan import RoundSizes
from refine_titan.config.phases import has_inner_steps, needs_engine
from refine_titan.config.sections import JobConfig
from refine_titan.data.dataloader import DataProgress
from refine_titan.distributed.precision import compute_precision
from refine_titan.distributed.stop_request import StopRequest
from refine_titan.errors import UserError
from refine_titan.inference import stop_tokens
from refine_titan.monitoring.resumed_settings import parts_to_begin_anew
from refine_titan.monitoring.run_monitor import RunMonitor
from refine_titan.rollout.build import build_rollout_engine
from refine_titan.starting_point import describe_run
from refine_titan.steps.outer_step import AnswerScorer, OuterStep
from refine_titan.steps.refine_step import RefineStep
from refine_titan.steps.runtime import StepRuntime


class RefineTrainer(Trainer):
    """Trains with `objective = "refine"` or its step-matched baseline `"ntp"`, on documents or (post-training) on prompts and their
    answers."""

    job_config: JobConfig

    def __init__(
        self,
        job_config: JobConfig,
        stop_request: StopRequest | None = None,
        scorer: AnswerScorer | None = None,
        round_sizes: RoundSizes | None = None,
    ):
        """
        Args:
            stop_request: ends the run after a step; None for a run that nobody stops.
            scorer: rewards answers where `posttrain.outer = "reward"`.
            round_sizes: how many microbatches share a round of rollouts on this rank; None for what needs little memory.
        """
        super().__init__(job_config)
        with ExitStack() as on_failure:
            on_failure.callback(super().close)  # torchtitan's threads and files
            on_failure.callback(self.dataloader.close)
            self._complete(job_config, stop_request, scorer, round_sizes)
            on_failure.pop_all()

    def _complete(
        self, job_config: JobConfig, stop_request: StopRequest | None, scorer: AnswerScorer | None, round_sizes: RoundSizes | None
    ) -> None:
        """Adds to torchtitan's trainer what ReFINE needs."""
        self.stop_request = stop_request or StopRequest()
        self.stopped_by: signal.Signals | None = None
        guard_dcp(in_one_process=dist.get_world_size() == 1 and self.device.type == "cpu")
        description = describe_run(job_config, self.model_args, self.tokenizer, newest_checkpoint(self.checkpointer))
        write_description_with_checkpoints(self.checkpointer, description)
        explain_failed_writes(self.checkpointer)
        keep_settings_when_loading(self.checkpointer, self.optimizers, self.lr_schedulers)
        keep_latest_whole(self.checkpointer)
        self.maybe_enable_amp = compute_precision(job_config, self.parallel_dims)
        self.monitor = RunMonitor(job_config, self.tokenizer, self.metrics_processor)
        runtime = StepRuntime(
            job_config,
            self.model_parts[0],
            self.optimizers,
            self.parallel_dims,
            self.device,
            precision=lambda: self.maybe_enable_amp,
            before_weights_change=lambda: self.checkpointer.maybe_wait_for_staging(),
            round_sizes=self._agreed(round_sizes or RoundSizes.without_estimate(job_config, self.gradient_accumulation_steps)),
        )
        self.engine = build_rollout_engine(job_config, runtime.engine_host) if needs_engine(job_config) else None
        self.refine_step = RefineStep(runtime, self.engine, self.monitor, self.tokenizer.decode)
        self.outer_step = None
        if job_config.refine.phase == "posttrain":
            ends = stop_tokens(job_config, self.tokenizer)
            self.outer_step = OuterStep(self.refine_step, self.tokenizer, self.monitor, scorer, ends)

    def _agreed(self, sizes: RoundSizes) -> RoundSizes:
        """Returns sizes that suit every rank, whose forwards are collectives."""
        smallest = torch.tensor(astuple(sizes), device=self.device)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        return RoundSizes(*smallest.tolist())

    def train_step(self, data_iterator: Iterator[tuple[dict[str, Any], torch.Tensor]]) -> None:
        """Trains on one batch: its ReFINE (or NTP) steps, then in post-training the outer one."""
        if is_checkpoint_due(self.checkpointer, self.step - 1):
            self.refuse_unwritten(self.step - 1)
        if self.job_config.validation.enable:
            self.validator.catch_up(self.model_parts, self.step - 1)
        step = self.refine_step
        metrics = step.begin(self.step)
        learning_rate = self.lr_schedulers.schedulers[0].get_last_lr()[0]
        with metrics.stage("data"):
            batches = [next(data_iterator)[0]["batch"].to(self.device) for _ in range(self.gradient_accumulation_steps)]
        if has_inner_steps(self.job_config):
            step.run(batches, len(batches) // self.job_config.refine.num_mini_batches)
        if self.outer_step is not None:
            self.outer_step.run(batches)
        self.lr_schedulers.step()
        self.monitor.log_step(self.step, metrics, learning_rate, step.update_count, step.runtime.token_group)
        self.stop_if_requested()

    def train(self) -> None:
        """Resumes or starts, trains, and prints a summary."""
        first_step = resume_step(self.checkpointer, self.job_config.checkpoint.load_step, self.dataloader.num_streams)
        if first_step:
            self.checkpointer.exclude_from_loading = parts_to_begin_anew(self.job_config, first_step)
        self.monitor.begin(first_step)
        self.monitor.show_data(self.dataloader.source_description())
        if self.job_config.validation.enable:
            self.validator.begin(first_step)
        self.stop_if_requested()
        super().train()
        await_writing(self.checkpointer)
        self.refuse_unwritten(self.step)
        if self.stopped_by is None:
            self.monitor.finish(self.step, self.refine_step.skipped_updates, DataProgress.at(self.dataloader.state_dict()))
        else:
            self.monitor.close()
            self.tell_stop()

    def stop_if_requested(self) -> None:
        """Ends the run at this step, on all ranks, if one of them has been asked to stop; the loop then writes a checkpoint."""
        if self.step < self.job_config.training.steps:
            self.stopped_by = self.stop_request.agreed(self.device)
        if self.stopped_by is not None:
            checkpoint_this_step(self.checkpointer)

    def refuse_unwritten(self, step: int) -> None:
        """Ends the run, after the checkpoint of a step if it writes any, if it has metrics that cannot be written.

        Raises:
            UserError: on rank 0, which writes them.
        """
        problem = self.monitor.problem or (self.validator.problem if self.job_config.validation.enable else None)
        if problem is None:
            return
        await_writing(self.checkpointer)
        goes_on = f". The same command goes on from step-{step}" if is_checkpoint_due(self.checkpointer, step) else ""
        raise UserError(f"{problem}{goes_on}")

    def should_continue_training(self) -> bool:
        return self.stopped_by is None and super().should_continue_training()

    def tell_stop(self) -> None:
        """Says where the run stands.

        Raises:
            UserError: if the run cannot continue, because it writes no checkpoints.
        """
        checkpoint = self.job_config.checkpoint
        stop = f"{self.stopped_by.name}: the run has stopped after step {self.step} of {self.job_config.training.steps}"
        if self.step and (not checkpoint.enable or checkpoint.load_only):
            setting = "checkpoint.load_only" if checkpoint.enable else "checkpoint.enable"
            raise UserError(f"{stop}, and cannot go on: {setting} is {getattr(checkpoint, setting.partition('.')[2])}")
        if dist.get_rank() == 0:
            print(f"{stop}. The same command goes on.", flush=True)

    def close(self) -> None:
        self.dataloader.close()
        self.monitor.close()
        if self.job_config.validation.enable:
            self.validator.close()
        if self.engine is not None:
            self.engine.close()
        super().close()

    def state_dict(self) -> dict[str, Any]:
        step = self.refine_step
        own = {"seed": step.seed, "update_count": step.update_count, "skipped_updates": step.skipped_updates}
        return super().state_dict() | own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if state_dict["seed"] != self.job_config.debug.seed:
            raise UserError(
                f"debug.seed is {self.job_config.debug.seed}, but the checkpoint's run has {state_dict['seed']}: its data order "
                "and draws cannot be continued with another seed"
            )
        self.refine_step.update_count = state_dict["update_count"]
        self.refine_step.skipped_updates = state_dict["skipped_updates"]
