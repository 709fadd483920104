"""Decoding steps over states in an engine's pages: each sequence takes one token, and all have read some before.

They are the steps of the native engine, with states that are gathered from pages and put back. Without attention nothing in them depends
on the host, so that a CUDA graph repeats them with one launch. Legend: n sequences, L layers, D hidden channels.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from refine_titan.models.attention.mixer import AttentionMixer
from refine_titan.models.decoder import FastWeightDecoder
from refine_titan.models.decoding import Decoding, DecodingClock, StateBuffers
from refine_titan.models.shared_prefix import LayerState, SharedPrefixLayout, SharedPrefixMixer
from refine_titan.rollout.decode_graph import Record

# Graphs that are kept. A round needs one; answers, which end one after the other, need one for every size that remains.
MAX_GRAPHS = 16


class Pages(Protocol):
    """What one layer keeps of all sequences."""

    def begin_step(self, page_n: torch.Tensor | None) -> Decoding:
        """Returns what the sequences on these pages carry; None as pages if the layer finds them by itself."""

    def end_step(self, page_n: torch.Tensor | None, decoding: Decoding) -> None:
        """Takes back what the sequences carry after the step."""


class StatePages:
    """States of fixed size of one layer.

    Args:
        tensors: those of the mixer's `state_shapes`, by name, `[pages, ...]`. They stay where they are.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors

    def begin_step(self, page_n: torch.Tensor) -> StateBuffers:
        return StateBuffers({name: x.index_select(0, page_n) for name, x in self.tensors.items()})

    def end_step(self, page_n: torch.Tensor, decoding: StateBuffers) -> None:
        for name, x in self.tensors.items():
            x.index_copy_(0, page_n, decoding.tensors[name])


class PagedSteps:
    """The decoding steps of a model whose states lie in pages.

    Args:
        decoder: one that `has_paged_steps`.
        pages: those of each layer. Page 0 belongs to no sequence.
    """

    def __init__(self, decoder: FastWeightDecoder, pages: Sequence[Pages]):
        self._decoder, self._pages = decoder, pages
        self._record: Record | None = None
        self._recorded: OrderedDict[int, _RecordedStep] = OrderedDict()
        self._sizes: set[int] = set()

    def record(self, record: Record) -> None:
        """Records a step whose size comes for the second time, for later steps. The weights and the pages must stay where they are, and
        the model has no attention."""
        self._record = record

    def run(self, tokens_n: torch.Tensor, page_Ln: Sequence[torch.Tensor | None], positions_n: torch.Tensor) -> torch.Tensor:
        """Takes each sequence's next token. The result is overwritten by a later call.

        Args:
            page_Ln: for each layer the pages of the sequences, which are read and written; a recorded step takes those of the first.
            positions_n: number of tokens that each sequence has read, which attention needs.

        Returns:
            The final-norm hidden states of the tokens, `[n, D]`.
        """
        recorded = self._recorded_step(tokens_n.shape[0], tokens_n.device)
        if recorded is None:
            return self._step(tokens_n, page_Ln, DecodingClock.at(positions_n))
        return recorded.run(tokens_n, page_Ln[0])

    def _recorded_step(self, n: int, device: torch.device) -> "_RecordedStep | None":
        """Returns the recorded step for so many sequences; None if it is to run without a graph."""
        size = recorded_size(n)
        if self._record is None:
            return None
        if size not in self._recorded:
            if size not in self._sizes:
                self._sizes.add(size)
                return None
            while len(self._recorded) >= MAX_GRAPHS:
                self._recorded.popitem(last=False)
            self._recorded[size] = _RecordedStep(self._uniform_step, self._record, size, device)
        self._recorded.move_to_end(size)
        return self._recorded[size]

    def _uniform_step(self, tokens_n: torch.Tensor, page_n: torch.Tensor) -> torch.Tensor:
        return self._step(tokens_n, [page_n] * len(self._pages), DecodingClock())

    def _step(self, tokens_n: torch.Tensor, page_Ln: Sequence[torch.Tensor | None], clock: DecodingClock) -> torch.Tensor:
        layout = SharedPrefixLayout.decoding_step(tokens_n.shape[0], clock)
        hidden_nD = self._decoder.embed(tokens_n)
        for block, pages, page_n in zip(self._decoder.layers.values(), self._pages, page_Ln, strict=True):
            decoding = pages.begin_step(page_n)
            hidden_nD, _ = block(hidden_nD, layout, LayerState({"decoding": decoding}))
            pages.end_step(page_n, decoding)
        return self._decoder.final_norm(hidden_nD, tokens_n.shape[0])


class _RecordedStep:
    """A step for so many sequences, with buffers of its own for what it reads. Fewer sequences are filled up by page 0."""

    def __init__(self, step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], record: Record, size: int, device: torch.device):
        self._tokens_n, self._page_n = (torch.zeros(size, dtype=torch.long, device=device) for _ in range(2))

        def run() -> None:
            self._hidden_nD = step(self._tokens_n, self._page_n)

        # Recording runs the step, which changes states: page 0 is nobody's.
        self._replay = record(run)

    def run(self, tokens_n: torch.Tensor, page_n: torch.Tensor) -> torch.Tensor:
        n, size = tokens_n.shape[0], self._tokens_n.shape[0]
        for buffer, x in ((self._tokens_n, tokens_n), (self._page_n, page_n)):
            buffer.copy_(F.pad(x, (0, size - n)) if n < size else x)
        self._replay()
        return self._hidden_nD[:n]


def recorded_size(n: int) -> int:
    """The number of sequences that a recorded step for n has: 1, 2, 4, or a multiple of 8."""
    return next((size for size in (1, 2, 4) if n <= size), -(-n // 8) * 8)


def has_paged_steps(decoder: FastWeightDecoder) -> bool:
    """Whether the steps of all mixers need of a sequence no more than the tensors of `state_shapes`, or keys and values."""
    mixers = [block.mixer for block in decoder.layers.values()]
    return all(isinstance(m, AttentionMixer) or type(m).begin_decoding is SharedPrefixMixer.begin_decoding for m in mixers)


def has_recorded_steps(decoder: FastWeightDecoder) -> bool:
    """Whether these steps can be recorded, too."""
    return has_paged_steps(decoder) and all(block.mixer.step_can_be_recorded for block in decoder.layers.values())
