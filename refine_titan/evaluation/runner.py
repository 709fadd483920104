"""Answers and scores the samples that are not on disk yet, batch by batch, and writes them.

A killed evaluation can be resumed: batches are formed from all samples, and finished samples are then left out of them. With the
native engine a sample's answer does not depend on the other samples (`rollout/native_completion.py`).
"""

from collections.abc import Iterator, Sequence
from typing import Any

from refine_titan.evaluation.answering import Answerer
from refine_titan.evaluation.progress import EvaluationProgress
from refine_titan.evaluation.prompts import Prompt, batches
from refine_titan.evaluation.sample_lines import answer_line, document_line
from refine_titan.evaluation.sample_log import SampleKey, SampleLog, text_sha256
from refine_titan.evaluation.work import Work
from refine_titan.inference import Inference


def evaluate_unfinished(work: Work, log: SampleLog, answerer: Answerer | None, inference: Inference, bin_tokens: int) -> None:
    """Evaluates every sample that `log` does not have, and appends it there. `answerer` may be None if no prompt is left.

    Raises:
        UserError: if a sample in the log had another prompt.
        EngineError: if the engine fails, or a loss is not finite.
    """
    for sample in work.samples:
        log.require_same_prompt(sample, text_sha256(sample.prompt))
    todo = [] if answerer is None else list(unfinished_batches(work.prompts, answerer.batch_size, answerer.in_order, log))
    documents = [sample for sample in work.documents if SampleKey.from_sample(sample) not in log.lines]
    tokens = sum(len(prompt.tokens) for _, rest in todo for prompt in rest) + sum(sample.length for sample in documents)
    progress = EvaluationProgress(len(work.samples), tokens)
    progress.resume(log.lines.values())
    try:
        # Documents come first: test-time training with `ttt.carry_over` changes the weights for good.
        for sample in documents:
            _finish([document_line(sample, inference.forward, inference.tokenizer, inference.device, bin_tokens)], log, progress)
        for batch, rest in todo:
            lines = [answer_line(prompt, answer) for prompt, answer in zip(rest, answerer.answer(batch, rest))]
            _finish(lines, log, progress)
        progress.show(last=True)
    finally:
        progress.close()


def unfinished_batches(prompts: Sequence[Prompt], size: int, in_order: bool, log: SampleLog) -> Iterator[tuple[list[Prompt], list[Prompt]]]:
    """Yields the batches of all prompts, each with those of its prompts that are not on disk.

    A batch that is completely on disk is left out, unless later batches depend on it (`in_order`).
    """
    keys = {SampleKey.from_sample(prompt.sample) for prompt in prompts} - log.lines.keys()
    for batch in batches(prompts, size, in_order):
        rest = [prompt for prompt in batch if SampleKey.from_sample(prompt.sample) in keys]
        if rest or (in_order and keys):
            yield batch, rest


def _finish(lines: list[dict[str, Any]], log: SampleLog, progress: EvaluationProgress) -> None:
    log.append(lines)
    for line in lines:
        progress.add(line)
    progress.show()
