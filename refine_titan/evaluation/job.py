"""Runs one evaluation, from configuration and checkpoint to results."""

import json
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torchtitan.tools.utils import device_type

from refine_titan.benchmarks.question_metrics import find_metric
from refine_titan.config.sections import JobConfig
from refine_titan.errors import UserError
from refine_titan.estimation.checkpointing_choice import choose_checkpointing
from refine_titan.evaluation.adapted_answers import AdaptedAnswerer
from refine_titan.evaluation.answering import Answerer, EngineAnswerer
from refine_titan.evaluation.checkpoints import with_tokenizer
from refine_titan.evaluation.identity import begin_run, describe_run
from refine_titan.evaluation.prompts import AnswerProtocol, batches
from refine_titan.evaluation.ranks import Ranks
from refine_titan.evaluation.runner import UnfinishedWork, evaluate_share, send_share, write_all
from refine_titan.evaluation.sample_log import SampleKey, SampleLog, text_sha256
from refine_titan.evaluation.work import Work, evaluation_folder, load_tasks, plan_work
from refine_titan.hub.names import name_of_folder
from refine_titan.inference import Inference
from refine_titan.models.sizes import resolve_args
from refine_titan.monitoring.run_folder import FolderLock
from refine_titan.report.evaluation_report import write_report
from refine_titan.rollout.build import resolve_evaluation_engine
from refine_titan.steps.test_time import TestTimeTrainer


def output_folder(config: JobConfig, checkpoint: Path, name: str | None) -> Path:
    """Folder of an evaluation, `DUMP/evaluation/NAME`. The default name holds the checkpoint, `ttt` and the protocol."""
    name_there = name_of_folder(checkpoint)
    parts = [checkpoint.resolve().name if name_there is None else name_there.short()]
    if config.refine.phase == "ttt":
        parts.append("ttt")
    if config.evaluation.protocol != "default":
        parts.append(config.evaluation.protocol)
    return evaluation_folder(config) / (name or "-".join(parts))


def evaluate(config: JobConfig, checkpoint: Path, folder: Path, ranks: Ranks | None = None) -> dict[str, Any] | None:
    """Runs an evaluation, or the unfinished part of it, writes its results into `folder` and returns them.

    Args:
        ranks: the ranks that share the samples; None for this process alone.

    Returns:
        The results; None on ranks other than 0, and if the evaluation has been asked to stop.

    Raises:
        UserError: if settings, tasks, checkpoint or folder are wrong.
        EngineError: if the engine fails.
        LostRankError: if another rank fails.
    """
    ranks = ranks or Ranks(None)
    if not config.evaluation.tasks:
        raise UserError("evaluation.tasks is empty; name tasks, groups (niah, ruler, ruler_qa, longbench), perplexity, or files")
    if config.refine.phase == "ttt" and config.ttt.carry_over and ranks.size > 1:
        raise UserError(
            f"ttt.carry_over is true, and {ranks.size} ranks share the evaluation: each batch needs the weights that the batch before it "
            "left; allowed: one rank (NGPU=1), or ttt.carry_over = false"
        )
    find_metric(config.evaluation.metric)
    config = with_tokenizer(config, checkpoint)
    adapts = config.refine.phase == "ttt"
    engine = resolve_evaluation_engine(config, resolve_args(config.model), torch.device(device_type))
    config = replace(config, rollout=replace(config.rollout, engine=engine))
    if adapts:
        config = choose_checkpointing(config, num_ranks=1).config
    with Inference.from_config(config, checkpoint, trainable=adapts) as inference:
        protocol = AnswerProtocol.from_settings(config.evaluation, config.training.seq_len, inference.stop_tokens)
        if not ranks.is_writer:
            ranks.shared("loaded")
        work = plan_work(load_tasks(config, inference.tokenizer), protocol, inference.tokenizer)
        ranks.share("loaded")  # the other ranks find generated samples in the cache
        if not ranks.is_writer:
            _evaluate_and_send(ranks, inference, protocol, work)
            return None
        with _locked(folder):
            begin_run(folder, describe_run(inference, protocol, work) | {"name": folder.name})
            with closing(SampleLog(folder)) as log:
                is_finished = _evaluate_and_write(ranks, inference, protocol, work, log)
            return write_report(folder, training_run_folder(checkpoint)) if is_finished else None


def _evaluate_and_write(ranks: Ranks, inference: Inference, protocol: AnswerProtocol, work: Work, log: SampleLog) -> bool:
    """Does the part of rank 0: says what is left, evaluates its share, writes all lines. Returns whether every sample is finished."""
    settings, batching = inference.config.evaluation, _batching(inference.config)
    for sample in work.samples:
        log.require_same_prompt(sample, text_sha256(sample.prompt))
    ranks.share("work", {"samples": _samples_sha256(work), "finished": [SampleKey.from_sample(s) in log.lines for s in work.samples]})
    left = UnfinishedWork.of(work, log.lines.keys(), *batching)
    share = left.share_of(ranks.rank, ranks.size)
    with open_answerer(inference, protocol, work) if share.batches else nullcontext() as answerer:
        lines = evaluate_share(share, answerer, inference, settings.perplexity_bin_tokens)
        write_all(lines, ranks, log, len(work.samples), left.prompt_tokens)
    log.put_in_order([*work.documents, *(prompt.sample for batch in batches(work.prompts, *batching) for prompt in batch)])
    return len(log.lines) == len(work.samples)


def _evaluate_and_send(ranks: Ranks, inference: Inference, protocol: AnswerProtocol, work: Work) -> None:
    """Does the part of any other rank: evaluates its share of what is left, and sends the lines to rank 0."""
    settings, told = inference.config.evaluation, ranks.shared("work")
    if told["samples"] != _samples_sha256(work):
        raise UserError(
            f"rank {ranks.rank} on {socket.gethostname()} finds other samples than rank 0; the files that evaluation.tasks, "
            "evaluation.data_folder, evaluation.essay_folder and evaluation.perplexity_source name must be the same on all nodes"
        )
    finished = {SampleKey.from_sample(sample) for sample, is_finished in zip(work.samples, told["finished"]) if is_finished}
    share = UnfinishedWork.of(work, finished, *_batching(inference.config)).share_of(ranks.rank, ranks.size)
    with open_answerer(inference, protocol, work) if share.batches else nullcontext() as answerer:
        send_share(evaluate_share(share, answerer, inference, settings.perplexity_bin_tokens), ranks)


def _batching(config: JobConfig) -> tuple[int, bool]:
    """Prompts in a batch, and whether batches depend on earlier ones, as the answerer of `open_answerer` says."""
    adapts = config.refine.phase == "ttt"
    return (config.ttt.batch_size, config.ttt.carry_over) if adapts else (config.evaluation.batch_size, False)


def _samples_sha256(work: Work) -> str:
    return text_sha256(json.dumps([[*SampleKey.from_sample(sample), text_sha256(sample.prompt)] for sample in work.samples]))


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
