"""Answers and scores the samples that are not on disk yet, batch by batch, and writes them.

A killed evaluation can be resumed: batches are formed from all samples, and finished samples are then left out of them. Ranks take whole
batches, so a batch is the same with any number of ranks. With the native engine a sample's answer does not depend on the other samples
at all (`rollout/native_completion.py`).
"""

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from refine_titan.benchmarks.samples import Sample
from refine_titan.evaluation.answering import Answerer
from refine_titan.evaluation.prompts import Prompt, batches
from refine_titan.evaluation.ranks import Ranks
from refine_titan.evaluation.running_means import RunningMeans
from refine_titan.evaluation.sample_lines import answer_line, document_line
from refine_titan.evaluation.sample_log import SampleKey, SampleLog
from refine_titan.evaluation.work import Work
from refine_titan.inference import Inference
from refine_titan.progress import Progress


@dataclass(frozen=True)
class UnfinishedWork:
    """What is left of an evaluation, for all ranks or for one.

    Attributes:
        documents: samples of perplexity.
        batches: batches of all prompts, each with those of its prompts that are not finished.
    """

    documents: list[Sample]
    batches: list[tuple[list[Prompt], list[Prompt]]]

    @classmethod
    def of(cls, work: Work, finished: Collection[SampleKey], batch_size: int, in_order: bool) -> "UnfinishedWork":
        """Leaves finished samples out of the batches of all prompts."""
        documents = [sample for sample in work.documents if SampleKey.from_sample(sample) not in finished]
        return cls(documents, list(unfinished_batches(work.prompts, batch_size, in_order, finished)))

    def share_of(self, rank: int, num_ranks: int) -> "UnfinishedWork":
        """Deals documents and batches out in turn. Batches come longest first, so that the shares of all ranks take about as long."""
        return UnfinishedWork(self.documents[rank::num_ranks], self.batches[rank::num_ranks])

    @property
    def prompt_tokens(self) -> int:
        in_batches = sum(len(prompt.tokens) for _, rest in self.batches for prompt in rest)
        return in_batches + sum(sample.length for sample in self.documents)


def unfinished_batches(
    prompts: Sequence[Prompt], size: int, in_order: bool, finished: Collection[SampleKey]
) -> Iterator[tuple[list[Prompt], list[Prompt]]]:
    """Yields the batches of all prompts, each with those of its prompts that are not finished.

    A batch that is completely finished is left out, unless later batches depend on it (`in_order`).
    """
    keys = {SampleKey.from_sample(prompt.sample) for prompt in prompts}.difference(finished)
    for batch in batches(prompts, size, in_order):
        rest = [prompt for prompt in batch if SampleKey.from_sample(prompt.sample) in keys]
        if rest or (in_order and keys):
            yield batch, rest


Lines = list[dict[str, Any]]
# Least time between two lines that show progress where there is no terminal.
SECONDS_BETWEEN_LINES = 10.0


def evaluate_share(share: UnfinishedWork, answerer: Answerer | None, inference: Inference, bin_tokens: int) -> Iterator[Lines]:
    """Evaluates a rank's share; yields the lines of each document and batch. `answerer` may be None if there is no batch.

    Raises:
        EngineError: if the engine fails, or a loss is not finite.
    """
    # Documents come first: test-time training with `ttt.carry_over` changes the weights for good.
    for sample in share.documents:
        yield [document_line(sample, inference.forward, inference.tokenizer, inference.device, bin_tokens)]
    for batch, rest in share.batches:
        yield [answer_line(prompt, answer) for prompt, answer in zip(rest, answerer.answer(batch, rest))]


def send_share(lines_of_share: Iterator[Lines], ranks: Ranks) -> None:
    """Sends a rank's lines to rank 0 as they come, until its share is finished or any rank has been asked to stop."""
    for lines in lines_of_share:
        ranks.send(lines)
        if ranks.should_stop():
            break
    ranks.end()


def write_all(lines_of_share: Iterator[Lines], ranks: Ranks, log: SampleLog, num_samples: int, prompt_tokens: int) -> None:
    """Writes rank 0's own lines and those of the other ranks as they come, and shows progress.

    Args:
        num_samples: samples of the evaluation, finished ones included.
        prompt_tokens: tokens of everything that is left, on all ranks.
    """
    means, finished = RunningMeans(), len(log.lines)
    for line in log.lines.values():
        means.add(line)
    show_at = {"stream": sys.stdout, "seconds_between_lines": SECONDS_BETWEEN_LINES}
    # Prompts are far longer than answers, so the time left is proportional to their tokens.
    with Progress("evaluating", num_samples, "samples", done=finished, work=prompt_tokens, **show_at) as progress:

        def write(lines: Lines) -> None:
            if lines:
                log.append(lines)
                for line in lines:
                    means.add(line)
                read = sum(line["prompt_tokens"] for line in lines)
                written = sum(line.get("response_tokens", 0) for line in lines)
                progress.advance(len(lines), tokens=read + written, work=read, others=means.texts())

        _write_all(lines_of_share, ranks, write)
        progress.write_line()


def _write_all(lines_of_share: Iterator[Lines], ranks: Ranks, write: Callable[[Lines], None]) -> None:
    try:
        for lines in lines_of_share:
            write(lines)
            write(ranks.receive())
            ranks.check()
            if ranks.should_stop():
                break
    except BaseException:
        write(ranks.receive())  # what other ranks have finished is not lost
        raise
    for lines in ranks.receive_rest():
        write(lines)
