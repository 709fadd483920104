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
    """The answer to a prompt.

    Attributes:
        completion: text and tokens of the answer.
        seconds: time to complete the batch, divided by its number of prompts.
        adaptation_seconds: time to adapt to the batch, divided by its number of prompts; None without test-time training.
        adaptation: report of the adaptation; None without test-time training.
    """

    completion: Completion
    seconds: float
    adaptation_seconds: float | None = None
    adaptation: dict[str, Any] | None = None


class Answerer(Protocol):
    """Anything that answers batches of prompts.

    Attributes:
        batch_size: prompts in a batch.
        in_order: whether answers depend on earlier batches. If so, batches come in the order of the samples, and a resumed
            evaluation passes finished batches too, with nothing to answer.
    """

    batch_size: int
    in_order: bool

    def answer(self, batch: Sequence[Prompt], todo: Sequence[Prompt]) -> list[Answer]:
        """Answers the prompts `todo`, which are those of the batch that have no answer yet, in order."""


def completion_requests(prompts: Sequence[Prompt], protocol: AnswerProtocol, seed: int) -> list[tuple[list[int], CompletionRequest]]:
    """Makes the requests that complete a batch: one for all prompts with the same stop strings, with the prompts' indices in the batch.

    A sample's random draws depend only on the seed and the sample.
    """
    requests = []
    stop_strings = [protocol.stop_strings(prompt.sample) for prompt in prompts]
    for stops in dict.fromkeys(stop_strings):
        chosen = [i for i, own in enumerate(stop_strings) if own == stops]
        request = CompletionRequest(
            prompts=tuple(tuple(prompts[i].tokens) for i in chosen),
            max_tokens=tuple(prompts[i].sample.max_new_tokens for i in chosen),
            seeds=tuple(answer_seed(seed, prompts[i].sample) for i in chosen),
            stop_strings=stops,
            stop_tokens=protocol.stop_tokens,
            temperature=protocol.temperature,
            top_k=protocol.top_k,
        )
        requests.append((chosen, request))
    return requests


def complete_prompts(
    engine: CompletionEngine,
    prompts: Sequence[Prompt],
    protocol: AnswerProtocol,
    tokenizer: BaseTokenizer,
    seed: int,
) -> list[Completion]:
    """Completes each prompt, in order."""
    completions: dict[int, Completion] = {}
    for chosen, request in completion_requests(prompts, protocol, seed):
        completions |= zip(chosen, engine.complete(request, tokenizer.decode))
    return [completions[i] for i in range(len(prompts))]


def answer_seed(seed: int, sample: Sample) -> int:
    """Seed of a sample's random draws."""
    return derive_seed(seed, "answer", sample.benchmark, sample.task, sample.length or 0, sample.index)


@dataclass(frozen=True)
class EngineAnswerer:
    """An `Answerer` that uses an engine with its weights as they are.

    Attributes:
        engine: completes prompts.
        protocol: says how.
        tokenizer: decodes answers.
        seed: seed of every draw.
        batch_size, in_order: as in `Answerer`.
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
