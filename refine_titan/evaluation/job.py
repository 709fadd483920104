"""Runs one evaluation, from configuration and checkpoint to results."""

from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torchtitan.tools.utils import device_type

from refine_titan.config.sections import JobConfig
from refine_titan.errors import UserError
from refine_titan.evaluation.adapted_answers import AdaptedAnswerer
from refine_titan.evaluation.answering import Answerer, EngineAnswerer
from refine_titan.evaluation.checkpoints import with_tokenizer
from refine_titan.evaluation.identity import begin_run, describe_run
from refine_titan.evaluation.prompts import AnswerProtocol
from refine_titan.evaluation.runner import evaluate_unfinished
from refine_titan.evaluation.sample_log import SampleKey, SampleLog
from refine_titan.evaluation.work import Work, evaluation_folder, load_tasks, plan_work
from refine_titan.inference import Inference
from refine_titan.models.sizes import resolve_args
from refine_titan.monitoring.run_folder import FolderLock
from refine_titan.report.evaluation_report import write_report
from refine_titan.rollout.build import resolve_evaluation_engine
from refine_titan.steps.test_time import TestTimeTrainer


def output_folder(config: JobConfig, checkpoint: Path, name: str | None) -> Path:
    """Folder of an evaluation, `DUMP/evaluation/NAME`. The default name holds the checkpoint, `ttt` and the protocol."""
    parts = [checkpoint.resolve().name]
    if config.refine.phase == "ttt":
        parts.append("ttt")
    if config.evaluation.protocol != "default":
        parts.append(config.evaluation.protocol)
    return evaluation_folder(config) / (name or "-".join(parts))


def evaluate(config: JobConfig, checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Runs an evaluation, or the unfinished part of it, writes its results into `folder` and returns them.

    Raises:
        UserError: if settings, tasks, checkpoint or folder are wrong.
        EngineError: if the engine fails.
    """
    if not config.evaluation.tasks:
        raise UserError("evaluation.tasks is empty; name tasks, groups (niah, ruler, ruler_qa, longbench), perplexity, or files")
    config = with_tokenizer(config, checkpoint)
    adapts = config.refine.phase == "ttt"
    engine = resolve_evaluation_engine(config, resolve_args(config.model), torch.device(device_type))
    config = replace(config, rollout=replace(config.rollout, engine=engine))
    with Inference.from_config(config, checkpoint, trainable=adapts) as inference:
        protocol = AnswerProtocol.from_settings(config.evaluation, config.training.seq_len)
        work = plan_work(load_tasks(config, inference.tokenizer), protocol, inference.tokenizer)
        with _locked(folder):
            begin_run(folder, describe_run(inference, protocol, work) | {"name": folder.name})
            with closing(SampleLog(folder)) as log:
                # Building an engine takes memory and seconds, so it is built only if a prompt is left.
                has_prompts = any(SampleKey.from_sample(prompt.sample) not in log.lines for prompt in work.prompts)
                with open_answerer(inference, protocol, work) if has_prompts else nullcontext() as answerer:
                    evaluate_unfinished(work, log, answerer, inference, config.evaluation.perplexity_bin_tokens)
            return write_report(folder, training_run_folder(checkpoint))


def training_run_folder(checkpoint: Path) -> Path | None:
    """Folder of the training run that wrote a checkpoint, for the report's curves; None if it is not there."""
    folder = checkpoint.resolve().parent.parent
    return folder if (folder / "metrics.jsonl").is_file() else None


@contextmanager
def open_answerer(inference: Inference, protocol: AnswerProtocol, work: Work) -> Iterator[Answerer]:
    """Builds the answerer of an evaluation's prompts, and closes its engine at the end."""
    config = inference.config
    settings = config.evaluation
    longest = max((len(p.tokens) + p.sample.max_new_tokens for p in work.prompts), default=1)
    if config.refine.phase == "ttt":
        trainer = TestTimeTrainer(inference, settings.batch_size, longest)
        engine, answerer = trainer.engine, AdaptedAnswerer(trainer, protocol, settings.seed)
    else:
        engine = inference.build_engine(config.rollout.engine, width=settings.batch_size, max_tokens=longest)
        answerer = EngineAnswerer(engine, protocol, inference.tokenizer, settings.seed, settings.batch_size)
    try:
        yield answerer
    finally:
        if engine is not None:
            engine.close()


@contextmanager
def _locked(folder: Path):
    lock = FolderLock(folder, setting="--output", doing="evaluating")
    try:
        yield
    finally:
        lock.release()
