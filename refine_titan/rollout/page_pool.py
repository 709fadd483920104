"""The pages of an engine with paged memory: how large they are, and how many a sequence takes. Nothing here imports vLLM.

vLLM (0.32.0) makes the pages of all layers equally large. It divides the layers with states, and those with keys and values, into groups
of as many layers each. A block is one page for every layer of a group, and a sequence takes blocks for each group.
"""

from dataclasses import dataclass

import torch

from refine_titan.models.attention.args import AttentionArgs
from refine_titan.models.decoder import DecoderArgs
from refine_titan.rollout.pages import PageLayout

# vLLM's attention kernels take pages of a multiple of so many tokens. Where one wants more (128 for heads of 256 channels on Blackwell
# GPUs), vLLM rounds up by itself.
TOKENS_MULTIPLE = 32
# One block more, which vLLM keeps for itself.
BLOCKS_OF_VLLM = 1


def obstacle(args: DecoderArgs) -> str | None:
    """Returns what hinders a model from running in vLLM; None if nothing does."""
    kinds = attentions(args)
    if len(kinds) == args.n_layers and kinds:
        return "attention in every layer"
    if len({(a.n_heads, a.n_kv_heads, a.head_dim) for a in kinds}) > 1:
        return "layers of attention with different heads"
    return None


def attentions(args: DecoderArgs) -> list[AttentionArgs]:
    """Returns the attention of each layer that has one."""
    found = map(args.attention_of, range(args.n_layers))
    return [a for a in found if a is not None]


@dataclass(frozen=True)
class PagePool:
    """Sizes of pages and groups, of one of the ranks that share a model's heads.

    Attributes:
        page_bytes: of one layer's page.
        group_layers: layers of a group.
        state_groups: groups of layers with states of fixed size. A sequence has one state in each, and while vLLM copies it several.
        attention_groups: groups of layers with keys and values.
        block_tokens: tokens whose keys and values lie in a page; 0 without attention.
    """

    page_bytes: int
    group_layers: int
    state_groups: int
    attention_groups: int
    block_tokens: int

    @classmethod
    def of(cls, args: DecoderArgs, dtype: torch.dtype, degree: int = 1, least_tokens: int = 1) -> "PagePool":
        """Returns the pool of a model that computes in `dtype` and has no `obstacle`.

        Args:
            degree: ranks that share the heads.
            least_tokens: smallest number of tokens of a page of attention.
        """
        state_bytes, layers = PageLayout.of(args, dtype).num_bytes_of_part(degree), attentions(args)
        if not layers:
            return cls(state_bytes, args.n_layers, 1, 0, 0)
        token_bytes = 2 * max(layers[0].n_kv_heads // degree, 1) * layers[0].head_dim * dtype.itemsize
        tokens = _round_up(max(least_tokens, _divide_up(state_bytes, token_bytes)), TOKENS_MULTIPLE)
        few, many = sorted([len(layers), args.n_layers - len(layers)])
        group = many if many < 1.5 * few else few
        return cls(tokens * token_bytes, group, _divide_up(args.n_layers - len(layers), group), _divide_up(len(layers), group), tokens)

    @property
    def block_bytes(self) -> int:
        return self.page_bytes * self.group_layers

    def state_blocks(self, states: int) -> int:
        """Returns the blocks of so many states of all layers."""
        return self.state_groups * states

    def shared_blocks(self, tokens: int) -> int:
        """Returns the blocks of keys and values of `tokens` tokens that sequences share: blocks that are full."""
        return self.attention_groups * (tokens // self.block_tokens) if self.attention_groups else 0

    def own_blocks(self, tokens: int, is_after_shared: bool) -> int:
        """Returns the blocks of keys and values of `tokens` tokens of one sequence.

        Args:
            is_after_shared: whether these tokens come after others, in a block that is not shared because it is not full.
        """
        return self.attention_groups * (_divide_up(tokens, self.block_tokens) + is_after_shared) if self.attention_groups else 0


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


def _round_up(a: int, multiple: int) -> int:
    return _divide_up(a, multiple) * multiple
