"""Runs an evaluation: what is not on disk yet is prepared, answered batch by batch, scored and written; then the results.

An evaluation that was killed goes on: batches are made of all samples, finished ones are left out of them, and a sample's answer
depends on nothing but itself (`rollout/native_completion.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torchtitan.components.tokenizer import BaseTokenizer

from refine_titan.errors import UserError
from refine_titan.evaluation import perplexity
from refine_titan.evaluation.generation import Answer, Answerer, Prompt, Protocol, batches, prepare_prompt
from refine_titan.evaluation.inference import Inference
from refine_titan.evaluation.metrics import score
from refine_titan.evaluation.progress import EvaluationProgress
from refine_titan.evaluation.sample_log import SampleKey, SampleLog, text_sha256
from refine_titan.evaluation.samples import Sample, TaskSamples


@dataclass(frozen=True)
class Work:
    """What an evaluation has to do.

    Attributes:
        tasks: their names.
        prompts: of all tasks but perplexity.
        documents: those of perplexity.
        skipped: reason -> number of rows that are not evaluated, by the task's name.
        notes: what a reader of the results has to know.
    """

    tasks: tuple[str, ...]
    prompts: list[Prompt]
    documents: list[Sample]
    skipped: dict[str, dict[str, int]]
    notes: tuple[str, ...]

    @property
    def samples(self) -> list[Sample]:
        return [*(prompt.sample for prompt in self.prompts), *self.documents]


def plan(tasks: Sequence[TaskSamples], protocol: Protocol, tokenizer: BaseTokenizer) -> Work:
    """Tokenizes and cuts every prompt.

    Raises:
        UserError: if nothing is left to evaluate, or two tasks have the same samples.
    """
    prompts, documents, keys = [], [], set()
    skipped = {task.name: dict(task.skipped) for task in tasks}
    for task in tasks:
        for sample in task.samples:
            key = SampleKey.of(sample)
            if key in keys:
                raise UserError(f"evaluation.tasks: {key} is given twice (the second time by {task.name!r})")
            keys.add(key)
            if sample.benchmark == perplexity.TASK:
                documents.append(sample)
                continue
            prompt = prepare_prompt(sample, protocol, tokenizer)
            if prompt.tokens:
                prompts.append(prompt)
            else:
                reasons = skipped[task.name]
                reasons["empty prompt"] = reasons.get("empty prompt", 0) + 1
    if not prompts and not documents:
        counts = "; ".join(f"{name}: {_counts(reasons)}" for name, reasons in skipped.items())
        raise UserError(f"evaluation.tasks: there is nothing to evaluate ({counts})")
    notes = tuple(dict.fromkeys(note for task in tasks for note in task.notes))
    reported = {name: reasons for name, reasons in skipped.items() if reasons}
    return Work(tuple(task.name for task in tasks), prompts, documents, reported, notes)


def run(work: Work, log: SampleLog, answerer: Answerer, inference: Inference, bin_tokens: int) -> None:
    """Evaluates every sample that `log` does not have, and appends it there.

    Raises:
        UserError: if a sample in the log had another prompt.
        EngineError: if an answer cannot be had, or a loss is not finite.
    """
    for sample in work.samples:
        log.require_same_prompt(sample, text_sha256(sample.prompt))
    todo = list(unfinished_batches(work.prompts, answerer.batch_size, log))
    documents = [sample for sample in work.documents if SampleKey.of(sample) not in log.lines]
    tokens = sum(len(prompt.tokens) for batch in todo for prompt in batch) + sum(sample.length for sample in documents)
    progress = EvaluationProgress(len(work.samples), tokens)
    progress.resume(log.lines.values())
    try:
        for batch in todo:
            lines = [answer_line(prompt, answer) for prompt, answer in zip(batch, answerer.answer(batch))]
            _finish(lines, log, progress)
        for sample in documents:
            _finish([document_line(sample, inference, bin_tokens)], log, progress)
        progress.show(last=True)
    finally:
        progress.close()


def unfinished_batches(prompts: Sequence[Prompt], size: int, log: SampleLog) -> Iterator[list[Prompt]]:
    """The batches of all prompts, without what is on disk."""
    for batch in batches(prompts, size):
        rest = [prompt for prompt in batch if SampleKey.of(prompt.sample) not in log.lines]
        if rest:
            yield rest


def answer_line(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    """The line of `samples.jsonl` of a scored answer."""
    sample, completion = prompt.sample, answer.completion
    metrics = score(sample.benchmark, sample.task, completion.text, sample.answers)
    return _head(sample) | {
        "prompt_tokens": len(prompt.tokens),
        "cut_tokens": prompt.cut_tokens,
        "response": completion.text,
        "response_tokens": len(completion.tokens),
        "answers": list(sample.answers),
        "score": next(iter(metrics.values())),
        "metrics": metrics,
        "seconds": round(answer.seconds, 4),
        "adaptation_seconds": None if answer.adaptation_seconds is None else round(answer.adaptation_seconds, 4),
    }


def document_line(sample: Sample, inference: Inference, bin_tokens: int) -> dict[str, Any]:
    """The line of `samples.jsonl` of a document of perplexity."""
    losses, seconds = perplexity.document_losses(
        sample, inference.forward, inference.tokenizer, inference.device, bin_tokens
    )
    return _head(sample) | {
        "prompt_tokens": sample.length,
        "cut_tokens": 0,
        "nll": losses.nll,
        "nll_by_position": losses.nll_by_position,
        "positions": losses.positions,
        "seconds": round(seconds, 4),
        "adaptation_seconds": None,
    }


def _head(sample: Sample) -> dict[str, Any]:
    return {
        "benchmark": sample.benchmark,
        "task": sample.task,
        "index": sample.index,
        "length": sample.length,
        "depth": sample.depth,
        "prompt_sha256": text_sha256(sample.prompt),
    }


def _finish(lines: list[dict[str, Any]], log: SampleLog, progress: EvaluationProgress) -> None:
    log.append(lines)
    for line in lines:
        progress.add(line)
    progress.show()


def _counts(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "no rows"
