"""Draws a vLLM engine's tokens as the native engine draws them, with vLLM's interface for logits processors.

vLLM 0.32.0's own seeded sampling fails on a CPU when a prefix is read in several steps ("CPU Generator does not use offset"),
and on a GPU how often a seed's generator advances depends on those steps. Legend: n outputs, k tokens, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

from refine_kernels.packing import on_device
from refine_titan.objective.losses import chosen_logprobs
from refine_titan.rollout.sampling import Draws, sample_tokens

# Key of a request's `extra_args` that says which row of the draws is its own.
NUMBER = "number"


class SeededDraws(LogitsProcessor):
    """Chooses the next token of every request that has draws, and leaves nothing else possible."""

    current: Draws | None = None

    def __init__(self, vllm_config, device: torch.device, is_pin_memory: bool):
        # Row of the batch to number and output tokens so far; vLLM appends to the list.
        self._requests: dict[int, tuple[int, list[int]]] = {}

    @classmethod
    @contextmanager
    def use(cls, draws: Draws) -> Iterator[None]:
        """Makes `draws` those of all requests that run."""
        cls.current = draws
        try:
            yield
        finally:
            cls.current = None

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._requests.pop(row, None)
        for row, parameters, _, output in batch_update.added:
            self._requests.pop(row, None)
            if NUMBER in (parameters.extra_args or {}):
                self._requests[row] = (parameters.extra_args[NUMBER], output)
        for source, target, direction in batch_update.moved:
            moved, replaced = self._requests.pop(source, None), self._requests.pop(target, None)
            if moved is not None:
                self._requests[target] = moved
            if replaced is not None and direction == MoveDirectionality.SWAP:
                self._requests[source] = replaced

    def apply(self, logits_nV: torch.Tensor) -> torch.Tensor:
        if not self._requests or self.current is None:
            return logits_nV
        draws = self.current
        # A prefix that is not read to its end is drawn for, too; vLLM throws that token away.
        indices = [(row, number, len(output)) for row, (number, output) in self._requests.items()]
        rows, numbers, steps = on_device(torch.tensor(indices).T.contiguous(), logits_nV.device)
        own_nV = logits_nV.index_select(0, rows)
        token_n = sample_tokens(own_nV, draws.uniforms_nk[numbers, steps], draws.temperature, draws.top_k)
        logprob_n = chosen_logprobs(own_nV[:, None], token_n[:, None], draws.temperature)[:, 0]
        draws.logprobs_nk[numbers, steps] = logprob_n.float()
        logits_nV.index_fill_(0, rows, -torch.inf)
        logits_nV.index_put_((rows, token_n), logits_nV.new_zeros(()))  # a number of the host would be copied, and waited for
        return logits_nV
