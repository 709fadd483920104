"""What the layers of a model keep in vLLM's pages: states of fixed size, and keys and values. Written for vLLM 0.32.0.

Legend: T tokens of a step, N sequences of a step, H query heads, K key heads, D channels of a head.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.linear_attn import LinearAttentionBackend, LinearAttentionMetadata, LinearAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from refine_kernels.packing import on_device
from refine_titan.models.attention.args import AttentionArgs
from refine_titan.models.decoding import Decoding
from refine_titan.models.shared_prefix import LayerState, SharedPrefixLayout, SharedPrefixMixer
from refine_titan.rollout.paged_steps import StatePages
from refine_titan.rollout.pages import PageLayout


class StepMetadata(LinearAttentionMetadata):
    """vLLM's metadata of a step, with its integers as the host has them: what it keeps on the device would have to be waited for."""

    cu_seqlens: tuple[int, ...]
    total_lengths: tuple[int, ...]

    @property
    def is_decoding(self) -> bool:
        """Whether every sequence takes one token, and has read some before."""
        num_sequences = len(self.cu_seqlens) - 1
        return self.cu_seqlens[-1] == num_sequences and min(self.total_lengths[:num_sequences]) > 1

    @property
    def slots_N(self) -> torch.Tensor:
        """Page of each sequence's state, in every layer of one group."""
        return self.state_indices_tensor[: len(self.cu_seqlens) - 1].long()


class StepMetadataBuilder(LinearAttentionMetadataBuilder):
    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False) -> StepMetadata:
        found = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata = StepMetadata(**{f.name: getattr(found, f.name) for f in fields(found)})
        metadata.cu_seqlens = tuple(common_attn_metadata.query_start_loc_cpu.tolist())
        # Exact but for speculative decoding, which the engine does not do.
        metadata.total_lengths = tuple(common_attn_metadata.seq_lens_cpu_upper_bound.tolist())
        return metadata


class StepBackend(LinearAttentionBackend):
    @staticmethod
    def get_builder_cls() -> type[StepMetadataBuilder]:
        return StepMetadataBuilder


@dataclass(frozen=True)
class StepLayout:
    """The sequences of one engine step that reads prefixes.

    Attributes:
        layout: where they lie in the flat stream; states are wanted at their ends.
        seen_N: number of tokens that each has read before, on the host; None if none has read any.
        is_new_N: whether each has read none, on the device; None if all have read some, or none has.
    """

    layout: SharedPrefixLayout
    seen_N: torch.Tensor | None
    is_new_N: torch.Tensor | None

    @classmethod
    def read(cls, metadata: StepMetadata) -> "StepLayout":
        cu_seqlens = metadata.cu_seqlens
        lengths = [end - start for start, end in zip(cu_seqlens, cu_seqlens[1:])]
        seen = [total - length for total, length in zip(metadata.total_lengths, lengths)]
        device = metadata.state_indices_tensor.device
        is_new_N = on_device(torch.tensor([count == 0 for count in seen]), device) if any(seen) and not all(seen) else None
        layout = SharedPrefixLayout(cu_seqlens, state_positions=cu_seqlens[1:])
        return cls(layout, torch.tensor(seen) if any(seen) else None, is_new_N)


class PagedState(StatePages, MambaBase):
    """One layer's states of all sequences, in vLLM's pages. To vLLM a page is one tensor of bytes, which it copies at once.

    Attributes:
        name: under which vLLM knows the layer.
    """

    mamba_type = MambaAttentionBackendEnum.LINEAR

    def __init__(self, mixer: SharedPrefixMixer, page: PageLayout, name: str):
        super().__init__({})
        self.mixer, self.page, self.name = mixer, page, name
        get_current_vllm_config().compilation_config.static_forward_context[name] = self

    def get_attn_backend(self) -> type[StepBackend]:
        return StepBackend

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return ((self.page.num_bytes,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.int8,)

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        super().bind_kv_cache(kv_cache)
        self.tensors = self.page.views(self.kv_cache[0])

    @property
    def device(self) -> torch.device:
        return self.kv_cache[0].device

    def read(self, step: StepLayout, slots_N: torch.Tensor) -> LayerState | None:
        """Returns the states of the step's sequences; None if none has a state. A page is never read before it was written: a new
        sequence starts from zeros, whatever its page holds."""
        if step.seen_N is None:
            return None
        tensors = {"seen": step.seen_N}
        for name, pages in self.tensors.items():
            tensors[name] = pages.index_select(0, slots_N)
            if step.is_new_N is not None:
                tensors[name].masked_fill_(step.is_new_N.view(-1, *[1] * (pages.dim() - 1)), 0)
        return LayerState(tensors)

    def write(self, slots: torch.Tensor, states: LayerState) -> None:
        """Writes each sequence's state into its page; `slots` are on the pages' device."""
        states = self.mixer.fixed_size(states)
        for name, pages in self.tensors.items():
            pages.index_copy_(0, slots, states[name].to(pages.dtype))

    def fill(self, value: float) -> None:
        """Gives all pages the same value."""
        for pages in self.tensors.values():
            pages.fill_(value)

    def release(self) -> None:
        """Lets go of the pages' memory."""
        self.kv_cache, self.tensors = (), {}


class PagedAttention(Decoding):
    """One layer's keys and values of all sequences, in vLLM's pages, which vLLM's own kernels read.

    To the layer's mixer every token of a step is a sequence that takes its next token.

    Args:
        args: of the attention.
        degree: ranks that share its heads.
        config: of the engine that is being built.
        name: under which vLLM knows the layer.
    """

    def __init__(self, args: AttentionArgs, degree: int, config: VllmConfig, name: str):
        self.name = name
        self.kernel = Attention(
            args.n_heads // degree,
            args.head_dim,
            args.head_dim**-0.5,
            num_kv_heads=args.n_kv_heads // degree,
            cache_config=config.cache_config,
            prefix=name,
        )

    def attend(self, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
        """Writes the tokens' keys and values into the pages, and lets each token attend to its sequence up to itself."""
        num_tokens, slots = q_THD.shape[0], get_forward_context().slot_mapping.get(self.name)
        # vLLM may count more tokens than the step has: those of no sequence.
        num_padding = 0 if slots is None else slots.shape[0] - num_tokens
        rows = [(F.pad(x, (0, 0, 0, 0, 0, num_padding)) if num_padding else x).contiguous() for x in (q_THD, k_TKD, v_TKD)]
        return self.kernel(*rows)[:num_tokens].view(q_THD.shape)

    def is_uniform(self) -> bool:
        """What vLLM's kernels read is made anew for every step."""
        return False

    def begin_step(self, page_n: None) -> "PagedAttention":
        return self

    def end_step(self, page_n: None, decoding: Decoding) -> None:
        """Nothing to put back."""

    def fill(self, value: float) -> None:
        """Gives all pages the same value."""
        self.kernel.kv_cache.fill_(value)

    def release(self) -> None:
        """Lets go of the pages' memory."""
        self.kernel.kv_cache = self.kernel.kv_cache.new_empty(0)


def write_keys_and_values(kernel: Attention, slots: torch.Tensor, k_RKD: torch.Tensor, v_RKD: torch.Tensor) -> None:
    """Writes keys and values of R tokens into the pages of a layer.

    Args:
        slots: page times its number of tokens plus the place in the page, of each token; on the pages' device.
    """
    k, v = (x.to(kernel.kv_cache_torch_dtype).contiguous() for x in (k_RKD, v_RKD))
    # The layouts of vLLM's kernels differ; each has this function.
    kernel.impl.do_kv_cache_update(kernel, k, v, kernel.kv_cache, slots)
