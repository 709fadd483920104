"""From prompts to answers: tokens without special ones, prompts cut to a limit, batches of like lengths, an engine's completions."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torchtitan.components.tokenizer import BaseTokenizer

from refine_titan.benchmarks.metrics import LONGBENCH_METRICS, first_line
from refine_titan.benchmarks.samples import Sample
from refine_titan.config.sections import Evaluation
from refine_titan.data.questions import cut_tokens
from refine_titan.errors import UserError

# How the published code samples its validation answers.
REFERENCE_TEMPERATURE, REFERENCE_TOP_K = 1.0, 50


@dataclass(frozen=True)
class AnswerProtocol:
    """How prompts become answers. Everything that changes an answer, besides the weights.

    Attributes:
        temperature: of sampling; 0 is greedy.
        top_k: tokens that sampling leaves possible; 0 for all.
        cut: where tokens are taken out of a prompt that is too long.
        max_prompt_tokens: longest prompt; 0 for what `context_tokens` leaves.
        context_tokens: tokens of prompt and answer together, where nothing says more.
        stop_at_newline: whether answers of which only the first line is scored end with it.
    """

    temperature: float
    top_k: int
    cut: Literal["middle", "right"]
    max_prompt_tokens: int
    context_tokens: int
    stop_at_newline: bool

    @classmethod
    def from_settings(cls, settings: Evaluation, context_tokens: int) -> "AnswerProtocol":
        """What `[evaluation]` asks for."""
        reference = settings.protocol == "reference"
        return cls(
            temperature=REFERENCE_TEMPERATURE if reference else 0.0,
            top_k=REFERENCE_TOP_K if reference else 0,
            cut=settings.cut if settings.cut != "auto" else "right" if reference else "middle",
            max_prompt_tokens=settings.max_prompt_tokens,
            context_tokens=context_tokens,
            stop_at_newline=settings.stop_at_newline,
        )

    def prompt_limit(self, sample: Sample) -> int:
        """Longest prompt of a sample, in tokens; less than 1 where the answer alone takes the whole context."""
        return self.max_prompt_tokens or max(self.context_tokens, sample.length or 0) - sample.max_new_tokens

    def stop_strings(self, sample: Sample) -> tuple[str, ...]:
        """What ends a sample's answer besides end-of-sequence."""
        return ("\n",) if self.stop_at_newline and scored_by_first_line(sample.benchmark, sample.task) else ()


def scored_by_first_line(benchmark: str, task: str) -> bool:
    """Whether nothing behind an answer's first newline can change any of its metrics. (RULER QA's second metric reads the whole
    answer; trec, triviaqa and samsum skip newlines at its beginning.)"""
    return benchmark == "longbench" and task in LONGBENCH_METRICS and LONGBENCH_METRICS[task][2] is first_line


@dataclass(frozen=True)
class Prompt:
    """A sample as the engine gets it.

    Attributes:
        sample: whose prompt it is.
        tokens: without BOS, EOS or chat template, cut to the limit.
        cut_tokens: how many were taken out.
    """

    sample: Sample
    tokens: array
    cut_tokens: int


def prepare_prompt(sample: Sample, protocol: AnswerProtocol, tokenizer: BaseTokenizer) -> Prompt:
    """A sample's tokens, cut to the limit.

    Raises:
        UserError: if the answer leaves no room for a prompt.
    """
    limit = protocol.prompt_limit(sample)
    if limit < 1:
        raise UserError(
            f"{sample.benchmark}/{sample.task} asks for answers of {sample.max_new_tokens} tokens, which is all that "
            f"training.seq_len = {protocol.context_tokens} has room for; set evaluation.max_prompt_tokens"
        )
    tokens = tokenizer.encode(sample.prompt)
    return Prompt(sample, array("i", cut_tokens(tokens, limit, protocol.cut)), max(len(tokens) - limit, 0))


def batches(prompts: Sequence[Prompt], size: int, in_order: bool = False) -> Iterator[list[Prompt]]:
    """Batches of prompts in the order given, or of about one length: longest first, so that the first batch shows what memory is
    needed. Which prompts then share a batch does not depend on the order of `prompts`."""
    ordered = prompts if in_order else sorted(prompts, key=_by_length)
    for start in range(0, len(ordered), size):
        yield list(ordered[start : start + size])


def _by_length(prompt: Prompt) -> tuple:
    sample = prompt.sample
    return (-len(prompt.tokens), sample.benchmark, sample.task, sample.length or 0, sample.index)
