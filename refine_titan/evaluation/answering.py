"""Answers prompts with an engine, in batches, with the weights as they are."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torchtitan.components.tokenizer import BaseTokenizer

from refine_titan.benchmarks.samples import Sample
from refine_titan.evaluation.prompts import AnswerProtocol, Prompt
from refine_titan.rollout.completion import Completion, CompletionEngine, CompletionRequest
from refine_titan.seeding import derive_seed


class Answer(NamedTuple):
    """What came of a prompt: the completion; seconds of the batch's generation and, with test-time training, of its adaptation, both
    by the number of its prompts; and what the adaptation reports."""

    completion: Completion
    seconds: float
    adaptation_seconds: float | None = None
    adaptation: dict[str, Any] | None = None


class Answerer(Protocol):
    """Answers batches of prompts.

    Attributes:
        batch_size: prompts of a batch.
        in_order: whether answers depend on the batches before: batches then come in the order of the samples, and on resume even
            those that are finished are given, with nothing to answer.
    """

    batch_size: int
    in_order: bool

    def answer(self, batch: Sequence[Prompt], todo: Sequence[Prompt]) -> list[Answer]:
        """One answer for each prompt of the batch that is still to do, in order."""


def complete_prompts(
    engine: CompletionEngine,
    prompts: Sequence[Prompt],
    protocol: AnswerProtocol,
    tokenizer: BaseTokenizer,
    seed: int,
) -> list[Completion]:
    """One completion per prompt, in order. A sample's draws come from the seed and the sample alone."""
    completions: dict[int, Completion] = {}
    stop_strings = [protocol.stop_strings(prompt.sample) for prompt in prompts]
    for stops in dict.fromkeys(stop_strings):
        chosen = [i for i, own in enumerate(stop_strings) if own == stops]
        request = CompletionRequest(
            prompts=tuple(tuple(prompts[i].tokens) for i in chosen),
            max_tokens=tuple(prompts[i].sample.max_new_tokens for i in chosen),
            seeds=tuple(answer_seed(seed, prompts[i].sample) for i in chosen),
            stop_strings=stops,
            stop_tokens=() if tokenizer.eos_id is None else (tokenizer.eos_id,),
            temperature=protocol.temperature,
            top_k=protocol.top_k,
        )
        completions |= zip(chosen, engine.complete(request, tokenizer.decode))
    return [completions[i] for i in range(len(prompts))]


def answer_seed(seed: int, sample: Sample) -> int:
    """Of a sample's draws."""
    return derive_seed(seed, "answer", sample.benchmark, sample.task, sample.length or 0, sample.index)


@dataclass(frozen=True)
class EngineAnswerer:
    """Answers by an engine with the weights as they are.

    Attributes:
        batch_size: prompts of a batch.
    """

    engine: CompletionEngine
    protocol: AnswerProtocol
    tokenizer: BaseTokenizer
    seed: int
    batch_size: int
    in_order: bool = False

    def answer(self, batch: Sequence[Prompt], todo: Sequence[Prompt]) -> list[Answer]:
        begin = time.perf_counter()
        completions = complete_prompts(self.engine, todo, self.protocol, self.tokenizer, self.seed)
        seconds = (time.perf_counter() - begin) / len(todo)
        return [Answer(completion, seconds) for completion in completions]
