"""The interface of engines that complete prompts with long outputs: requests, outputs, and the stop strings that end them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class CompletionRequest:
    """A request for one output per prompt. The i-th of `prompts`, `max_tokens` and `seeds` belong together.

    Attributes:
        prompts: token ids.
        max_tokens: most tokens of each output.
        seeds: seed of each output's draws, 63 bits.
        stop_strings: an output ends before the first of these strings.
        stop_tokens: an output ends before the first of these tokens, e.g. end-of-sequence.
        temperature: sampling temperature; 0 is greedy.
        top_k: number of likeliest tokens that can be sampled; 0 for all.
    """

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: tuple[int, ...]
    seeds: tuple[int, ...]
    stop_strings: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    temperature: float = 0.0
    top_k: int = 0

    def __post_init__(self):
        if not len(self.prompts) == len(self.max_tokens) == len(self.seeds):
            sizes = [len(self.prompts), len(self.max_tokens), len(self.seeds)]
            raise ValueError(f"prompts, max_tokens and seeds must be equally many, got {sizes}")
        if not self.prompts:
            raise ValueError("there are no prompts")
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; allowed: at least 0")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; allowed: at least 0")
        if any(not prompt for prompt in self.prompts):
            raise ValueError(f"prompt {next(i for i, p in enumerate(self.prompts) if not p)} is empty")
        if any(count < 1 for count in self.max_tokens):
            raise ValueError(f"max_tokens is {min(self.max_tokens)}; allowed: at least 1")
        if "" in self.stop_strings:
            raise ValueError("a stop string is empty")


@dataclass(frozen=True)
class Completion:
    """One output.

    Attributes:
        tokens: the sampled tokens, with those that hold a stop string, without a stop token.
        text: their text, up to the stop string.
        finish_reason: `stop` where a stop string or token was found, else `length`.
    """

    tokens: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]


class CompletionEngine(Protocol):
    """Completes prompts with the weights that it holds."""

    def complete(self, request: CompletionRequest, decode: Decode) -> list[Completion]:
        """Returns one output per prompt, in order.

        Args:
            decode: turns token ids into text.

        Raises:
            EngineError: if a prompt and its output are longer than the engine was built for, or the engine fails.
        """


class StopStrings:
    """Finds where an output that grows token by token ends."""

    def __init__(self, strings: Sequence[str], decode: Decode):
        self._strings, self._decode = tuple(strings), decode
        # A stop string spans at most as many tokens as it has bytes; the rest is for characters cut at the window's edge.
        self._window = max((len(string.encode()) for string in strings), default=0) + 8

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether the last token completed a stop string."""
        if not self._strings:
            return False
        tail = self._decode(tokens[-self._window :])
        return any(string in tail for string in self._strings)

    def text(self, tokens: Sequence[int]) -> str:
        """Returns the text of an output, up to the first stop string."""
        text = self._decode(tokens)
        ends = [text.find(string) for string in self._strings]
        return text[: min((end for end in ends if end >= 0), default=len(text))]
