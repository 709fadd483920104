"""Hands the trainer's own prefix states to a vLLM engine in the same process, so that it decodes without reading any prefix.

This is a vLLM connector, whose purpose is to fetch a prompt's states from elsewhere. To the scheduler all of a prompt but its last token is
"external". Before the step that reads this token, the connector writes what the trainer has of the prefix into the sequence's pages.
Rollouts of one document share the pages of their keys and values: vLLM's prefix cache finds those that an earlier one has filled, and
the connector writes the rest. Written for vLLM 0.32.0.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from refine_kernels.packing import on_device
from refine_titan.models.shared_prefix import LayerState
from refine_titan.rollout.vllm_pages import PagedState, write_keys_and_values
from refine_titan.rollout.vllm_sampling import NUMBER


@dataclass(frozen=True)
class Placement:
    """Where a rollout that starts in a step has its pages.

    Attributes:
        rollout: its number.
        num_tokens: tokens of its prefix without the last.
        num_shared: of these, the first ones, whose keys and values are in pages already.
        pages: for each of vLLM's groups of layers the page of every block of tokens.
    """

    rollout: int
    num_tokens: int
    num_shared: int
    pages: tuple[list[int], ...]


@dataclass
class Placements(KVConnectorMetadata):
    """The rollouts that start in a step."""

    rollouts: list[Placement]


class StateHandover(KVConnectorBase_V1, SupportsHMA):
    """The connector of both the scheduler and the worker, with states that this process offers."""

    offered: list[LayerState] | None = None

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any = None):
        super().__init__(vllm_config, role, kv_cache_config)
        self._layers = vllm_config.compilation_config.static_forward_context
        self._groups = kv_cache_config.kv_cache_groups
        self._placements = Placements([])

    @classmethod
    @contextmanager
    def offer(cls, layers: list[LayerState]) -> Iterator[None]:
        """Lets requests start from these states; the i-th sequence is that of rollout i."""
        cls.offered = layers
        try:
            yield
        finally:
            cls.offered = None

    # The scheduler's half

    @property
    def supports_divergent_local_hybrid_hits(self) -> bool:
        """Pages of keys and values are shared without a state at their end: the connector writes that of the whole prefix."""
        return True

    def bind_kv_cache_manager(self, kv_cache_manager) -> None:
        """Lets vLLM find the shared pages of a rollout without the last of them, if the prefix without its last token ends with it and
        no state has been kept there. Else nothing would be left to hand over, and vLLM would read the prefix."""
        super().bind_kv_cache_manager(kv_cache_manager)
        find = kv_cache_manager.get_computed_blocks_for_connector
        block_tokens = max(group.kv_cache_spec.block_size for group in self._groups)

        def find_all_but_the_state(request) -> tuple[Any, int, int, bool]:
            blocks, num_tokens, boundary, lacks_state = find(request)
            if lacks_state and num_tokens == request.num_prompt_tokens - 1 and self._is_offered(request):
                num_tokens -= block_tokens
                blocks = kv_cache_manager.truncate_computed_blocks(blocks, num_tokens)
            return blocks, num_tokens, boundary, lacks_state

        kv_cache_manager.get_computed_blocks_for_connector = find_all_but_the_state

    def _is_offered(self, request) -> bool:
        return self.offered is not None and NUMBER in (request.kv_transfer_params or {})

    def get_num_new_matched_tokens(self, request, num_computed_tokens: int) -> tuple[int, bool]:
        if not self._is_offered(request):
            return 0, False
        # A rollout that vLLM has interrupted may find more than its prefix.
        return max(request.num_prompt_tokens - 1 - num_computed_tokens, 0), False

    def update_state_after_alloc(self, request, blocks, num_external_tokens: int) -> None:
        if num_external_tokens:
            count = request.num_prompt_tokens - 1
            pages = tuple(list(ids) for ids in blocks.get_block_ids())
            placement = Placement(request.kv_transfer_params[NUMBER], count, count - num_external_tokens, pages)
            self._placements.rollouts.append(placement)

    def build_connector_meta(self, scheduler_output) -> Placements:
        placements, self._placements = self._placements, Placements([])
        return placements

    def request_finished_all_groups(self, request, block_ids) -> tuple[bool, None]:
        return False, None

    # The worker's half

    def start_load_kv(self, forward_context, **kwargs: Any) -> None:
        placements = self._get_connector_metadata().rollouts
        if not placements:
            return
        index = {name: i for i, name in enumerate(self._layers)}
        # Not in vLLM's inference mode: index tensors that operators keep between calls serve the trainer, too.
        with torch.inference_mode(False), torch.no_grad():
            for number, group in enumerate(self._groups):
                block_tokens, pages = group.kv_cache_spec.block_size, [p.pages[number] for p in placements]
                names = [name for name in group.layer_names if name in index]
                if isinstance(self._layers[names[0]], PagedState):
                    self._write_states(names, index, placements, pages, block_tokens)
                else:
                    self._write_keys_and_values(names, index, placements, pages, block_tokens)

    def _write_states(self, names: list[str], index: dict[str, int], placements: Sequence[Placement], pages, block_tokens: int) -> None:
        found = [
            (placement.rollout, own[column])
            for placement, own in zip(placements, pages)
            for column in state_columns(placement.num_tokens, len(own), block_tokens)
        ]
        rows, slots = torch.tensor(found).T.contiguous()
        slots = on_device(slots, self._layers[names[0]].device)
        for name in names:
            self._layers[name].write(slots, self.offered[index[name]].select(rows))

    def _write_keys_and_values(self, names, index, placements: Sequence[Placement], pages, block_tokens: int) -> None:
        places = []
        for placement, own in zip(placements, pages):
            position = np.arange(placement.num_shared, placement.num_tokens)
            places.append(np.array(own)[position // block_tokens] * block_tokens + position % block_tokens)
        slots = on_device(torch.from_numpy(np.concatenate(places)), self._layers[names[0]].kv_cache.device)
        rows, shared = torch.tensor([p.rollout for p in placements]), [p.num_shared for p in placements]
        for name in names:
            state = self.offered[index[name]].select(rows)
            keys, values = (torch.cat(state.tensors[x].without_first(shared).read()) for x in ("keys", "values"))
            write_keys_and_values(self._layers[name], slots, keys, values)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are complete when `start_load_kv` returns."""

    def save_kv_layer(self, layer_name: str, kv_layer, attn_metadata, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""


def state_columns(num_tokens: int, num_blocks: int, block_tokens: int) -> set[int]:
    """Returns the blocks of a sequence on whose pages the state after `num_tokens` tokens is written.

    A step reads the state on the page of its last block. If the tokens fill their blocks, vLLM has registered the page of the last of these
    for sequences that continue there, and has copied it to the next page before anything was written.
    """
    return {num_blocks - 1} | ({num_tokens // block_tokens - 1} if num_tokens % block_tokens == 0 else set())
