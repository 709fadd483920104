"""Entry point: read the config, build the trainer, run, close.

python -m refine_titan.train --job.config_file train_configs/debug_midtrain.toml [--section.key value ...] [--dry-run]
"""

import os
import signal
import sys
import traceback
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from torchtitan.tools.logging import logger

from refine_titan.benchmarks.metrics import QUESTIONS, check_task, score
from refine_titan.benchmarks.question_metrics import find_metric
from refine_titan.checkpointing import remove_incomplete
from refine_titan.config.batch_plan import plan_batch
from refine_titan.config.phases import needs_engine
from refine_titan.config.sections import JobConfig
from refine_titan.data.epochs import with_steps
from refine_titan.distributed.launched_rank import end_with_launcher, leave_error_to_launcher
from refine_titan.distributed.loopback import rank_environment
from refine_titan.distributed.stop_request import StopRequest, stopped_status
from refine_titan.distributed.toolchain import check_compiler
from refine_titan.dry_run import dry_run
from refine_titan.errors import ExtensionError, UsageError, UserError
from refine_titan.estimation.checkpointing_choice import choose_checkpointing, require_same_mode
from refine_titan.estimation.rounds import plan_rounds
from refine_titan.evaluation.periodic import build_validator
from refine_titan.files.reasons import in_words, is_about_a_file
from refine_titan.models.sizes import resolve_args
from refine_titan.monitoring.curves import build_curves_processor
from refine_titan.monitoring.run_folder import FolderLock
from refine_titan.registration import register_models
from refine_titan.rollout.engine import EngineError
from refine_titan.rollout.engine_memory import check_memory
from refine_titan.starting_point import refuse_unloaded_start
from refine_titan.steps.outer_step import AnswerScorer
from refine_titan.terminal import INTERRUPTED, begin_log, folded, raise_when_interrupted, show
from refine_titan.trainer import RefineTrainer
from refine_titan.validation import load_config


def main(args: list[str]) -> int:
    """Runs a job; returns the exit status: 0, 1 for the user's error, 2 for words of the command line that are wrong, 75 if it stopped on
    request, 130 for Ctrl-C."""
    raise_when_interrupted()
    begin_log()
    rank = int(os.environ.get("RANK", "0"))
    try:
        config = load_config([arg for arg in args if arg != "--dry-run"])
        if config.refine.phase == "ttt":
            raise UserError(
                "refine.phase is 'ttt', which adapts to the prompts of an evaluation: refine-titan evaluate run takes this file"
            )
        refuse_unloaded_start(config)
        begin_log(not config.metrics.disable_color_printing)
        check_compiler()
        scorer = answer_scorer(config)
        register_models(build_validator, build_curves_processor)
        if "--dry-run" in args:
            show(folded(dry_run(config)))
        else:
            end_with_launcher()
            with StopRequest() as stop_request, rank_environment():
                return run(config, stop_request, scorer)
    except (UserError, EngineError, OSError) as error:
        if isinstance(error, OSError):
            if not is_about_a_file(error):
                raise
            error = UserError(in_words(error))
        if isinstance(error, (EngineError, ExtensionError)) and error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        if not leave_error_to_launcher(error):
            print(f"error{f' on rank {rank}' if rank else ''}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except Exception as error:
        # The launcher shows the traceback of the rank that failed first: others fail when their connections to it end.
        if not leave_error_to_launcher(error):
            raise
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt
        if rank == 0:
            print("Interrupted. The same command goes on from the last checkpoint.", file=sys.stderr)
        return INTERRUPTED
    return 0


def run(config: JobConfig, stop_request: StopRequest, scorer: AnswerScorer | None = None) -> int:
    """Trains, or writes a seed checkpoint; returns the exit status. `scorer` rewards answers in post-training."""
    num_ranks = int(os.environ["WORLD_SIZE"])
    plan = plan_batch(config, num_ranks)
    if needs_engine(config):
        check_memory(config, resolve_args(config.model), num_ranks)
    choice = choose_checkpointing(config, num_ranks)
    config = choice.config
    if choice.words:
        logger.info(f"Activation checkpointing: {choice.words}")
    round_sizes = plan_rounds(config, num_ranks)
    lock = FolderLock(Path(config.job.dump_folder)) if os.environ["RANK"] == "0" else None
    trainer = None
    try:
        if lock is not None and config.checkpoint.enable:
            remove_incomplete(Path(config.job.dump_folder, config.checkpoint.folder))
        config = with_steps(config, plan.sequences)
        trainer = RefineTrainer(config, stop_request, scorer, round_sizes)
        if choice.words:
            require_same_mode(config, trainer.device)
        if config.checkpoint.create_seed_checkpoint:
            _write_seed_checkpoint(trainer)
        else:
            trainer.train()
            if trainer.stopped_by is not None:
                return stopped_status()
    finally:
        if trainer is not None:
            trainer.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if lock is not None:
            lock.release()
    return 0


def answer_scorer(config: JobConfig) -> AnswerScorer | None:
    """Returns the metric that rewards answers in post-training; None if no answers are sampled.

    Raises:
        UserError: if `posttrain.task` names no task with a metric.
    """
    if config.refine.phase != "posttrain" or config.posttrain.outer != "reward":
        return None
    benchmark, _, task = config.posttrain.task.partition("/")
    try:
        if benchmark == QUESTIONS:
            metric = find_metric(task, "posttrain.task")
            return lambda response, answers: metric(response, tuple(answers))
        check_task(benchmark, task)
    except UserError as error:
        raise UserError(f"posttrain.task is {config.posttrain.task!r}: {error}") from error
    return lambda response, answers: next(iter(score(benchmark, task, response, answers).values()))


def _write_seed_checkpoint(trainer: RefineTrainer) -> None:
    if int(os.environ["WORLD_SIZE"]) != 1 or not trainer.job_config.checkpoint.enable:
        raise UserError("checkpoint.create_seed_checkpoint needs one process (NGPU=1) and checkpoint.enable = true")
    trainer.checkpointer.save(curr_step=0, last_step=True)
    logger.info("Created seed checkpoint")


if __name__ == "__main__":
    sys.exit(record(main)(sys.argv[1:]))
