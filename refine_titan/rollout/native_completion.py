"""Decodes long outputs with a model of this process: reads every prompt once, then decodes all outputs together.

Legend: n outputs, k tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from refine_kernels.packing import on_device, on_host
from refine_titan.models.decoding import DecodingClock
from refine_titan.models.shared_prefix import LayerState, SharedPrefixLayout
from refine_titan.rollout.completion import Completion, CompletionRequest, Decode, StopStrings
from refine_titan.rollout.continuation import Model
from refine_titan.rollout.engine import EngineError
from refine_titan.rollout.sampling import sample_tokens, uniform_draws

# Tokens of a prompt that one forward reads, which bounds the memory of a long prompt.
READ_TOKENS = 16384


class ReadPrompt(NamedTuple):
    """The states after a prompt, per layer, and the logits `[1, V]` of the token that follows it."""

    states: list[LayerState]
    logits: torch.Tensor


@torch.no_grad()
def read_prompt(model: Model, tokens_T: torch.Tensor, read_tokens: int = READ_TOKENS) -> ReadPrompt:
    """Reads a prompt of any length, `read_tokens` tokens per forward; each forward continues from the states of the one before."""
    states = None
    for piece in tokens_T.split(read_tokens):
        count = piece.shape[0]
        layout = SharedPrefixLayout(cu_seqlens=(0, count), state_positions=(count,))
        out = model(piece, layout, initial_states=states, logit_rows=torch.tensor([count - 1]))
        states = [layer.detach() for layer in out.states]
    return ReadPrompt([layer.compact() for layer in states], out.logits)


class NativeCompletionEngine:
    """A `CompletionEngine` without a copy of the weights.

    An output does not depend on the other prompts: each prompt is read alone, and every decoding step has `width` tokens, filled up if
    there are fewer outputs. (A matrix product rounds a row in the same way only among equally many rows.)

    Args:
        model: takes the decoder's arguments.
        vocab_size: number of tokens that the model knows.
        device: device of the model.
        width: outputs that are decoded at once; further ones wait.
        precision: returns the context in which the model computes. It is entered once per request, so that autocast casts a weight once.
        ends_early: whether decoding ends when all outputs are finished. False makes as many forwards as `max_tokens` says, so that
            ranks that share a sharded model make equally many.
        read_tokens: tokens of a prompt that one forward reads.
    """

    name = "native"

    def __init__(
        self,
        model: Model,
        vocab_size: int,
        device: torch.device,
        *,
        width: int,
        precision: Callable[[], AbstractContextManager] = nullcontext,
        ends_early: bool = True,
        read_tokens: int = READ_TOKENS,
    ):
        self.model, self.vocab_size, self.device = model, vocab_size, device
        self.width, self.precision, self.ends_early, self.read_tokens = width, precision, ends_early, read_tokens

    @torch.no_grad()
    def complete(self, request: CompletionRequest, decode: Decode) -> list[Completion]:
        for i, prompt in enumerate(request.prompts):
            if not all(0 <= token < self.vocab_size for token in prompt):
                raise EngineError(f"prompt {i} has token ids outside 0..{self.vocab_size - 1}")
        with self.precision():
            return [completion for group in self._groups(request) for completion in self._complete_group(request, group, decode)]

    def count_forwards(self, request: CompletionRequest) -> int:
        """Forwards that a request takes; if decoding can end early, at most."""
        reading = sum(-(-len(prompt) // self.read_tokens) for prompt in request.prompts)
        return reading + sum(max(request.max_tokens[i] for i in group) - 1 for group in self._groups(request))

    def close(self) -> None:
        """Does nothing: the engine holds nothing."""

    def _groups(self, request: CompletionRequest) -> list[Sequence[int]]:
        """The outputs that are decoded together, by their indices."""
        indices = range(len(request.prompts))
        return [indices[i : i + self.width] for i in indices[:: self.width]]

    def _complete_group(self, request: CompletionRequest, group: Sequence[int], decode: Decode) -> list[Completion]:
        read = [read_prompt(self.model, on_device(torch.tensor(request.prompts[i]), self.device), self.read_tokens) for i in group]
        filled = [*read, *[read[0]] * (self.width - len(read))]
        states = [LayerState.cat(layers) for layers in zip(*(prompt.states for prompt in filled))]
        logits = torch.cat([prompt.logits for prompt in filled])
        seeds = [request.seeds[i] for i in group]
        limits = [request.max_tokens[i] for i in group]
        uniforms_nk = on_device(uniform_draws([*seeds, *[0] * (self.width - len(read))], max(limits)), self.device)
        stops = StopStrings(request.stop_strings, decode)
        outputs = [_Output(limit, request.stop_tokens, stops) for limit in limits]
        clock = DecodingClock()
        layout = SharedPrefixLayout.decoding_step(self.width, clock)
        rows = torch.arange(self.width, device=self.device)
        token_n = None
        for step in range(max(limits)):
            if token_n is not None:
                out = self.model(token_n, layout, initial_states=states, logit_rows=rows)
                clock.advance()
                states, logits = out.states, out.logits
            token_n = sample_tokens(logits, uniforms_nk[:, step], request.temperature, request.top_k)
            for output, token in zip(outputs, on_host(token_n)[0].tolist()):
                output.take(token)
            if self.ends_early and all(output.finished for output in outputs):
                break
        return [Completion(tuple(o.tokens), stops.text(o.tokens), "stop" if o.stopped else "length") for o in outputs]


class _Output:
    """An output that grows token by token until it is finished."""

    def __init__(self, limit: int, stop_tokens: Sequence[int], stops: StopStrings):
        self.tokens: list[int] = []
        self.stopped = False
        self._limit, self._stop_tokens, self._stops = limit, stop_tokens, stops

    @property
    def finished(self) -> bool:
        return self.stopped or len(self.tokens) == self._limit

    def take(self, token: int) -> None:
        if self.finished:
            return
        if token in self._stop_tokens:
            self.stopped = True
            return
        self.tokens.append(token)
        self.stopped = self._stops.ends(self.tokens)
