"""Hands the trainer's own prefix states to a vLLM engine in the same process, so that it decodes without reading any prefix.

This is a vLLM connector, whose purpose is to fetch a prompt's states from elsewhere. To the scheduler all of a prompt but its last token is
"external". Before the step that reads this token, the connector writes the trainer's state into the sequence's page. It works with one
page per sequence (no prefix caching). Written for vLLM 0.32.0.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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
from refine_titan.rollout.vllm_sampling import NUMBER


@dataclass
class Placements(KVConnectorMetadata):
    """Rollouts that start in a step, and their pages."""

    rollouts: list[int]
    pages: list[int]


class StateHandover(KVConnectorBase_V1, SupportsHMA):
    """The connector of both the scheduler and the worker, with states that this process offers."""

    offered: list[LayerState] | None = None

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any = None):
        super().__init__(vllm_config, role, kv_cache_config)
        self._states = vllm_config.compilation_config.static_forward_context
        self._placements = Placements([], [])

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

    def get_num_new_matched_tokens(self, request, num_computed_tokens: int) -> tuple[int, bool]:
        if self.offered is None or NUMBER not in (request.kv_transfer_params or {}):
            return 0, False
        return request.num_prompt_tokens - 1 - num_computed_tokens, False

    def update_state_after_alloc(self, request, blocks, num_external_tokens: int) -> None:
        if num_external_tokens:
            (pages, *_) = blocks.get_block_ids()
            self._placements.rollouts.append(request.kv_transfer_params[NUMBER])
            self._placements.pages.append(pages[0])

    def build_connector_meta(self, scheduler_output) -> Placements:
        placements, self._placements = self._placements, Placements([], [])
        return placements

    def request_finished_all_groups(self, request, block_ids) -> tuple[bool, None]:
        return False, None

    # The worker's half

    def start_load_kv(self, forward_context, **kwargs: Any) -> None:
        placements = self._get_connector_metadata()
        if not placements.rollouts:
            return
        rollouts, states = torch.tensor(placements.rollouts), list(self._states.values())
        pages = on_device(torch.tensor(placements.pages), states[0].device)
        for paged, layer in zip(states, self.offered):
            paged.write(pages, layer.select(rollouts))

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are complete when `start_load_kv` returns."""

    def save_kv_layer(self, layer_name: str, kv_layer, attn_metadata, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""
