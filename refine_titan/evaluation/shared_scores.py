"""Scores samples with the model of a training run, on the ranks that have it together.

Sharded parameters are gathered in every forward, so these ranks must make equally many. A rank with fewer reads a token as often as is
missing; the result counts for nothing.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torchtitan.components.tokenizer import BaseTokenizer

from refine_titan.benchmarks.samples import Sample
from refine_titan.config.sections import Evaluation
from refine_titan.evaluation import perplexity
from refine_titan.evaluation.answering import EngineAnswerer, completion_requests
from refine_titan.evaluation.prompts import AnswerProtocol, Prompt, batches
from refine_titan.evaluation.sample_lines import answer_line, document_line
from refine_titan.evaluation.work import Work
from refine_titan.models.shared_prefix import SharedPrefixLayout
from refine_titan.rollout.continuation import Model
from refine_titan.rollout.native_completion import NativeCompletionEngine


class SharedScores:
    """The samples of an evaluation in a fixed order, and their scores by a rank.

    Attributes:
        samples: batches of prompts, the longest first, then documents.
    """

    def __init__(self, work: Work, protocol: AnswerProtocol, tokenizer: BaseTokenizer, settings: Evaluation):
        self.protocol, self.tokenizer, self.settings = protocol, tokenizer, settings
        self._items: list[list[Prompt] | Sample] = [*batches(work.prompts, settings.batch_size), *work.documents]
        self.samples = [sample for item in self._items for sample in _samples_of(item)]

    @torch.no_grad()
    def of_rank(
        self,
        model: Model,
        vocab_size: int,
        device: torch.device,
        precision: Callable[[], AbstractContextManager],
        rank: int = 0,
        num_ranks: int = 1,
        ends_early: bool = True,
    ) -> torch.Tensor:
        """Scores every `num_ranks`-th batch and document, from the `rank`-th on.

        Args:
            ends_early: whether decoding ends when all answers of a batch are finished; False if the model is sharded.

        Returns:
            `[n, 2]`: score of each of `samples`, of a document its mean loss in nats a token and its next-token accuracy; float64, on the
            CPU; 0 for those of other ranks.

        Raises:
            EngineError: if a document's losses are not finite.
        """

        def forward(*args, **kwargs):
            with precision():
                return model(*args, **kwargs)

        width = self.settings.batch_size
        engine = NativeCompletionEngine(model, vocab_size, device, width=width, precision=precision, ends_early=ends_early)
        answerer = EngineAnswerer(engine, self.protocol, self.tokenizer, self.settings.seed, width)
        scores, begin = torch.zeros(len(self.samples), 2, dtype=torch.float64), 0
        for number, item in enumerate(self._items):
            size = len(_samples_of(item))
            if number % num_ranks == rank:
                scores[begin : begin + size] = torch.tensor(self._score(item, answerer, forward, device), dtype=torch.float64)
            begin += size
        if not ends_early:
            needed = [sum(self._forwards(item, engine) for item in self._items[other::num_ranks]) for other in range(num_ranks)]
            token, row = torch.zeros(1, dtype=torch.long, device=device), torch.zeros(1, dtype=torch.long)
            for _ in range(max(needed) - needed[rank]):
                forward(token, SharedPrefixLayout((0, 1)), logit_rows=row)
        return scores

    def _score(self, item: list[Prompt] | Sample, answerer: EngineAnswerer, forward: Model, device: torch.device) -> list[list[float]]:
        if isinstance(item, Sample):
            line = document_line(item, forward, self.tokenizer, device, self.settings.perplexity_bin_tokens)
            return [[line["nll"], line["accuracy"]]]
        return [[answer_line(prompt, answer)["score"], 0.0] for prompt, answer in zip(item, answerer.answer(item, item))]

    def _forwards(self, item: list[Prompt] | Sample, engine: NativeCompletionEngine) -> int:
        if isinstance(item, Sample):
            return perplexity.count_forwards(item)
        requests = completion_requests(item, self.protocol, self.settings.seed)
        return sum(engine.count_forwards(request) for _, request in requests)


def _samples_of(item: list[Prompt] | Sample) -> list[Sample]:
    return [item] if isinstance(item, Sample) else [prompt.sample for prompt in item]
