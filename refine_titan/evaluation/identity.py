"""Writes `run.json`, which identifies an evaluation, when it starts, and compares it when the evaluation is resumed."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.nn as nn
from torch.distributed.tensor import DTensor

from refine_titan.benchmarks.samples import Sample
from refine_titan.config.sections import JobConfig
from refine_titan.data.tokenizer import tokenizer_sha256
from refine_titan.errors import UserError
from refine_titan.evaluation.prompts import AnswerProtocol
from refine_titan.evaluation.sample_log import text_sha256
from refine_titan.evaluation.work import Work
from refine_titan.files.whole_files import write_atomically
from refine_titan.hub.names import name_of_folder, with_names
from refine_titan.inference import Inference
from refine_titan.models.model_config import read_json
from refine_titan.models.options import option_names
from refine_titan.models.stored_tensors import dtype_name, sha256_of_tensors
from refine_titan.monitoring.run_folder import versions
from refine_titan.report.records import FORMAT, RUN_FILE, cell_name
from refine_titan.rollout.build import engine_dtype

# Fields that may differ when an evaluation is resumed: they say where files are, or only describe.
MAY_DIFFER = ("name", "checkpoint", "versions", "config")


def describe_run(inference: Inference, protocol: AnswerProtocol, work: Work) -> dict[str, Any]:
    """Makes the content of `run.json`, except the name."""
    config, found = inference.config, versions()
    settings = config.evaluation
    haystacks = [note.removeprefix("haystack: ") for note in work.notes if note.startswith("haystack: ")]
    return {
        "checkpoint": str(inference.checkpoint and (name_of_folder(inference.checkpoint) or inference.checkpoint)),
        "weights_sha256": weights_sha256(inference.model),
        "tokenizer_sha256": tokenizer_sha256(inference.tokenizer),
        "model": {
            "name": config.model.name,
            "flavor": str(name_of_folder(config.model.flavor) or config.model.flavor),
            "args": {name: getattr(inference.args, name) for name in option_names(type(inference.args))},
        },
        "engine": config.rollout.engine,
        "engine_dtype": dtype_name(engine_dtype(config)),
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
        "asked": describe_samples(work.samples),
        "skipped": work.skipped,
        "notes": list(work.notes),
        "haystack": "; ".join(haystacks) or "none",
        "versions": found["packages"] | {"python": found["python"], "git_commit": found["git_commit"]},
        "config": with_names(config.to_dict()),
    }


def adaptation_settings(config: JobConfig) -> dict[str, Any] | None:
    """Lists every setting that an adaptation depends on; None without test-time training."""
    if config.refine.phase != "ttt":
        return None
    refine = {name: value for name, value in asdict(config.refine).items() if name != "phase"}
    optimizer = {name: getattr(config.optimizer, name) for name in ("name", "lr", "beta1", "beta2", "eps", "weight_decay")}
    training = {name: getattr(config.training, name) for name in ("max_norm", "local_batch_size")}
    rollout = {"importance_ratio_cap": config.rollout.importance_ratio_cap}
    return {**asdict(config.ttt), **training, **rollout, "refine": refine, "optimizer": optimizer}


def describe_samples(samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """Counts the samples of each task and length, and hashes their right answers and `max_new_tokens`."""
    by_cell: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_cell[cell_name((sample.benchmark, sample.task, sample.length))].append(sample)
    found = {}
    for name, cell in by_cell.items():
        answers = [[s.index, list(s.answers), s.max_new_tokens] for s in sorted(cell, key=lambda s: s.index)]
        found[name] = {"samples": len(cell), "answers_sha256": text_sha256(json.dumps(answers))}
        if cell[0].metric:
            found[name]["metric"] = cell[0].metric
    return found


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor of the state dict, sorted by name.

    It depends on the weights that answer, not on the file that they came from. One tensor at a time is copied to the CPU.
    """
    whole = ((name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor) for name, tensor in sorted(model.state_dict().items()))
    return sha256_of_tensors(whole)


def begin_run(folder: Path, run: dict[str, Any]) -> None:
    """Writes `run.json` into an empty folder; if the folder has one, checks that it identifies the same evaluation.

    Raises:
        UserError: if the folder holds another evaluation (the message names what differs) or other files.
    """
    path = folder / RUN_FILE
    run = json.loads(json.dumps({"format": FORMAT, **run}, default=str))
    if path.is_file():
        different = _differences(read_json(path), run)
        if different:
            raise UserError(
                f"{folder} holds another evaluation, which this one cannot resume: {'; '.join(different)}; give another "
                "--output, or remove the folder"
            )
        return
    strangers = [entry.name for entry in folder.iterdir() if entry.name != "lock"]
    if strangers:
        raise UserError(f"{folder} holds {sorted(strangers)[0]!r} but no {RUN_FILE}; give another --output")
    write_atomically(path, json.dumps(run, indent=1, ensure_ascii=False) + "\n")


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for name in (*new, *(name for name in old if name not in new)):
        before, now = old.get(name), new.get(name)
        if not prefix and name in MAY_DIFFER:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            lines += _differences(before, now, f"{prefix}{name}.")
        elif before != now:
            was = _short(before) if name in old else "not recorded"  # by an earlier version
            lines.append(f"{prefix}{name} was {was}, is {_short(now)}")
    return lines


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:97]}..."
