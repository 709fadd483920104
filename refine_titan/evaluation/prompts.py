"""Prepares prompts for an engine: tokenizes them without special tokens, cuts them to a limit, puts them into batches."""

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

# The published code samples its validation answers with these settings.
REFERENCE_TEMPERATURE, REFERENCE_TOP_K = 1.0, 50
# Characters of a prompt's end that are kept beside the answer; a token has at least one character, or is part of one.
END_CHARACTERS = 500


@dataclass(frozen=True)
class AnswerProtocol:
    """The settings with which prompts become answers: everything that changes an answer, besides weights and seed.

    Attributes:
        temperature: sampling temperature; 0 is greedy decoding.
        top_k: number of likeliest tokens that are sampled from; 0 for all tokens.
        cut: place where tokens are taken out of a prompt that is too long.
        max_prompt_tokens: tokens of the longest prompt; 0 for what the answer leaves of `context_tokens`.
        context_tokens: tokens of prompt and answer together, if the sample was not made for more.
        stop_at_newline: whether an answer ends after its first line if only that line is scored.
        stop_tokens: an answer ends before the first of these tokens, which are those of end-of-sequence.
    """

    temperature: float
    top_k: int
    cut: Literal["middle", "right"]
    max_prompt_tokens: int
    context_tokens: int
    stop_at_newline: bool
    stop_tokens: tuple[int, ...] = ()

    @classmethod
    def from_settings(cls, settings: Evaluation, context_tokens: int, stop_tokens: tuple[int, ...]) -> "AnswerProtocol":
        """Makes the protocol that `[evaluation]` asks for."""
        reference = settings.protocol == "reference"
        return cls(
            temperature=REFERENCE_TEMPERATURE if reference else 0.0,
            top_k=REFERENCE_TOP_K if reference else 0,
            cut=settings.cut if settings.cut != "auto" else "right" if reference else "middle",
            max_prompt_tokens=settings.max_prompt_tokens,
            context_tokens=context_tokens,
            stop_at_newline=settings.stop_at_newline,
            stop_tokens=stop_tokens,
        )

    def prompt_limit(self, sample: Sample) -> int:
        """Most tokens of a sample's prompt; less than 1 if the answer needs the whole context."""
        return self.max_prompt_tokens or max(self.context_tokens, sample.length or 0) - sample.max_new_tokens

    def stop_strings(self, sample: Sample) -> tuple[str, ...]:
        """Strings that end a sample's answer, besides the end-of-sequence tokens."""
        return ("\n",) if self.stop_at_newline and scored_by_first_line(sample.benchmark, sample.task) else ()


def scored_by_first_line(benchmark: str, task: str) -> bool:
    """Whether text after an answer's first newline changes none of the task's metrics.

    False for RULER QA, whose second metric reads the whole answer, and for trec, triviaqa and samsum, which skip leading newlines.
    """
    return benchmark == "longbench" and task in LONGBENCH_METRICS and LONGBENCH_METRICS[task][2] is first_line


@dataclass(frozen=True)
class Prompt:
    """A sample's prompt in the form that an engine gets.

    Attributes:
        sample: the sample.
        tokens: token ids without BOS, EOS or chat template, cut to the limit.
        cut_tokens: number of tokens that were taken out.
        end: text of the last tokens, to be read by people.
    """

    sample: Sample
    tokens: array
    cut_tokens: int
    end: str = ""


def prepare_prompt(sample: Sample, protocol: AnswerProtocol, tokenizer: BaseTokenizer) -> Prompt:
    """Tokenizes a sample's prompt and cuts it to the limit.

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
    kept = cut_tokens(tokens, limit, protocol.cut)
    # Of a prompt that was cut, this is what the model reads, not what the sample says.
    end = tokenizer.decode(kept[-END_CHARACTERS:])[-END_CHARACTERS:]
    return Prompt(sample, array("i", kept), max(len(tokens) - limit, 0), end)


def batches(prompts: Sequence[Prompt], size: int, in_order: bool = False) -> Iterator[list[Prompt]]:
    """Yields batches of `size` prompts, in the order given (`in_order`) or of similar length.

    Batches of similar length come longest first, so that the first batch shows how much memory is needed. They do not depend on
    the order of `prompts`.
    """
    ordered = prompts if in_order else sorted(prompts, key=_by_length)
    for start in range(0, len(ordered), size):
        yield list(ordered[start : start + size])


def _by_length(prompt: Prompt) -> tuple:
    sample = prompt.sample
    return (-len(prompt.tokens), sample.benchmark, sample.task, sample.length or 0, sample.index)
