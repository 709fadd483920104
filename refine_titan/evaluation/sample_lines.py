"""Makes the line of a finished sample in `samples.jsonl`."""

from typing import Any

import torch
from torchtitan.components.tokenizer import BaseTokenizer

from refine_titan.benchmarks.metrics import score
from refine_titan.benchmarks.question_metrics import score_question
from refine_titan.benchmarks.samples import Sample
from refine_titan.evaluation import perplexity
from refine_titan.evaluation.answering import Answer
from refine_titan.evaluation.prompts import Prompt
from refine_titan.evaluation.sample_log import text_sha256
from refine_titan.rollout.continuation import Model


def answer_line(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    """Scores an answer and makes its line."""
    sample, completion = prompt.sample, answer.completion
    if sample.metric:
        metrics = score_question(sample.metric, completion.text, sample.answers)
    else:
        metrics = score(sample.benchmark, sample.task, completion.text, sample.answers, sample.classes)
    adaptation = {} if answer.adaptation is None else {"adaptation": answer.adaptation}
    return (
        _head(sample)
        | adaptation
        | {
            "prompt_tokens": len(prompt.tokens),
            "cut_tokens": prompt.cut_tokens,
            "prompt_end": prompt.end,
            "response": completion.text,
            "response_tokens": len(completion.tokens),
            "answers": list(sample.answers),
            "score": next(iter(metrics.values())),
            "metrics": metrics,
            "seconds": round(answer.seconds, 4),
            "adaptation_seconds": None if answer.adaptation_seconds is None else round(answer.adaptation_seconds, 4),
        }
    )


def document_line(sample: Sample, model: Model, tokenizer: BaseTokenizer, device: torch.device, bin_tokens: int) -> dict[str, Any]:
    """Computes the losses of a perplexity document and makes its line.

    Raises:
        EngineError: if the losses are not finite.
    """
    losses, seconds = perplexity.document_losses(sample, model, tokenizer, device, bin_tokens)
    return _head(sample) | {
        "prompt_tokens": sample.length,
        "cut_tokens": 0,
        "nll": losses.nll,
        "accuracy": losses.accuracy,
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
