"""One evaluation from configuration and checkpoint to results."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torchtitan.tools.utils import device_type

from refine_titan.benchmarks.samples import Sample
from refine_titan.config.sections import JobConfig
from refine_titan.data.tokenizer import tokenizer_sha256
from refine_titan.errors import UserError
from refine_titan.evaluation import runner
from refine_titan.evaluation.adapted_answers import AdaptedAnswerer
from refine_titan.evaluation.checkpoints import engine_name, with_tokenizer
from refine_titan.evaluation.generation import Answerer, EngineAnswerer, Protocol
from refine_titan.evaluation.identity import begin_run, weights_sha256
from refine_titan.evaluation.sample_log import SampleKey, SampleLog, text_sha256
from refine_titan.evaluation.work import Work, evaluation_folder, load_tasks, plan
from refine_titan.inference import Inference
from refine_titan.monitoring.run_folder import FolderLock, versions
from refine_titan.report.evaluation_report import write_report
from refine_titan.report.records import cell_name
from refine_titan.steps.test_time import TestTimeTrainer


def output_folder(config: JobConfig, checkpoint: Path, name: str | None) -> Path:
    """Where an evaluation goes: `DUMP/evaluation/NAME`, by default named after the checkpoint and what changes its answers."""
    parts = [checkpoint.resolve().name]
    if config.refine.phase == "ttt":
        parts.append("ttt")
    if config.evaluation.protocol != "default":
        parts.append(config.evaluation.protocol)
    return evaluation_folder(config) / (name or "-".join(parts))


def evaluate(config: JobConfig, checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Runs an evaluation, or what is left of it, and writes its results into `folder`; returns them.

    Raises:
        UserError: naming what is wrong with settings, tasks, checkpoint or folder.
        EngineError: if the engine fails.
    """
    if not config.evaluation.tasks:
        raise UserError("evaluation.tasks is empty; name tasks, groups (niah, ruler, ruler_qa, longbench), perplexity, or files")
    config = with_tokenizer(config, checkpoint)
    adapts = config.refine.phase == "ttt"
    engine = engine_name(config, torch.device(device_type))
    config = replace(config, rollout=replace(config.rollout, engine=engine))
    with Inference.from_config(config, checkpoint, trainable=adapts) as inference:
        protocol = Protocol.of(config.evaluation, config.training.seq_len)
        work = plan(load_tasks(config, inference.tokenizer), protocol, inference.tokenizer)
        with _locked(folder):
            begin_run(folder, describe(inference, protocol, work) | {"name": folder.name})
            with closing(SampleLog(folder)) as log:
                # An engine takes memory and seconds: it is built for what there is to answer.
                has_prompts = any(SampleKey.of(prompt.sample) not in log.lines for prompt in work.prompts)
                with answerer(inference, protocol, work) if has_prompts else nullcontext() as answers:
                    runner.run(work, log, answers, inference, config.evaluation.perplexity_bin_tokens)
            return write_report(folder, training_run(checkpoint))


def training_run(checkpoint: Path) -> Path | None:
    """The folder of the run that wrote a checkpoint, whose curves the report shows; None where it is not there."""
    folder = checkpoint.resolve().parent.parent
    return folder if (folder / "metrics.jsonl").is_file() else None


@contextmanager
def answerer(inference: Inference, protocol: Protocol, work: Work) -> Iterator[Answerer]:
    """What answers the prompts of an evaluation."""
    config = inference.config
    settings = config.evaluation
    longest = max((len(p.tokens) + p.sample.max_new_tokens for p in work.prompts), default=1)
    if config.refine.phase == "ttt":
        trainer = TestTimeTrainer(inference, settings.batch_size, longest)
        engine, answers = trainer.engine, AdaptedAnswerer(trainer, protocol, settings.seed)
    else:
        engine = inference.build_engine(config.rollout.engine, width=settings.batch_size, max_tokens=longest)
        answers = EngineAnswerer(engine, protocol, inference.tokenizer, settings.seed, settings.batch_size)
    try:
        yield answers
    finally:
        if engine is not None:
            engine.close()


def adaptation_settings(config: JobConfig) -> dict[str, Any] | None:
    """Everything that an adaptation depends on, for `run.json`; None without one."""
    if config.refine.phase != "ttt":
        return None
    refine = {name: value for name, value in asdict(config.refine).items() if name != "phase"}
    optimizer = {name: getattr(config.optimizer, name) for name in ("name", "lr", "beta1", "beta2", "eps", "weight_decay")}
    training = {name: getattr(config.training, name) for name in ("max_norm", "local_batch_size")}
    return {**asdict(config.ttt), **training, "refine": refine, "optimizer": optimizer}


def describe(inference: Inference, protocol: Protocol, work: Work) -> dict[str, Any]:
    """The content of `run.json` but the name."""
    config, found = inference.config, versions()
    settings = config.evaluation
    haystacks = [note.removeprefix("haystack: ") for note in work.notes if note.startswith("haystack: ")]
    return {
        "checkpoint": str(inference.checkpoint),
        "weights_sha256": weights_sha256(inference.model),
        "tokenizer_sha256": tokenizer_sha256(inference.tokenizer),
        "model": {"name": config.model.name, "flavor": config.model.flavor},
        "engine": config.rollout.engine,
        "device": inference.device.type,
        "protocol": {
            "name": settings.protocol,
            "greedy": protocol.temperature == 0,
            **asdict(protocol),
            "batch_size": settings.batch_size,
            "precision": config.training.mixed_precision_param,
            "perplexity_bin_tokens": settings.perplexity_bin_tokens,
        },
        "phase": {"test_time_training": adaptation_settings(config)},
        "seed": settings.seed,
        "tasks": list(work.tasks),
        "asked": asked(work.samples),
        "skipped": work.skipped,
        "notes": list(work.notes),
        "haystack": "; ".join(haystacks) or "none",
        "versions": found["packages"] | {"python": found["python"], "git_commit": found["git_commit"]},
        "config": config.to_dict(),
    }


def asked(samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """How many samples there are of each task and length, and a hash of what they take as answers."""
    by_cell: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_cell[cell_name((sample.benchmark, sample.task, sample.length))].append(sample)
    found = {}
    for name, cell in by_cell.items():
        answers = [[s.index, list(s.answers), s.max_new_tokens] for s in sorted(cell, key=lambda s: s.index)]
        found[name] = {"samples": len(cell), "answers_sha256": text_sha256(json.dumps(answers))}
    return found


@contextmanager
def _locked(folder: Path):
    lock = FolderLock(folder, setting="--output", doing="evaluating")
    try:
        yield
    finally:
        lock.release()
