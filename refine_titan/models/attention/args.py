"""Sizes and options of one layer of attention."""

from dataclasses import dataclass
from typing import Literal

from refine_kernels.attention import MAX_HEAD_CHANNELS


@dataclass(frozen=True)
class AttentionArgs:
    """What the attention of a layer is made of.

    Attributes:
        dim: hidden channels.
        n_heads: query heads.
        n_kv_heads: key and value heads, which divide `n_heads`.
        head_dim: channels of a head.
        rotary_dim: channels of a head that are rotated by position, the first ones; 0 for no rotation.
        rope_theta: base of the rotation.
        qk_norm: RMSNorm of queries and keys: none, of every head, or of all heads together.
        qk_norm_eps: of that norm.
        offset_norm: whether that norm multiplies by 1 + its weight.
        output_gate: whether outputs are multiplied by the sigmoid of a projection.
        qkv_bias: whether the projections of queries, keys and values add a bias.

    Raises:
        ValueError: if heads do not divide, a head is too wide, or an odd number of channels is rotated.
    """

    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rotary_dim: int = 0
    rope_theta: float = 10000.0
    qk_norm: Literal["none", "head", "all heads"] = "none"
    qk_norm_eps: float = 1e-5
    offset_norm: bool = False
    output_gate: bool = False
    qkv_bias: bool = False

    def __post_init__(self):
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"attention has {self.n_heads} query heads and {self.n_kv_heads} key heads; allowed: a whole multiple")
        if self.head_dim > MAX_HEAD_CHANNELS:
            raise ValueError(f"a head of attention has {self.head_dim} channels; allowed: up to {MAX_HEAD_CHANNELS}")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(f"attention rotates {self.rotary_dim} of {self.head_dim} channels; allowed: an even number, up to all of them")

    def flops_per_token(self, seq_len: int) -> int:
        """Multiply-adds times two of scores and averages, forward, for a token of a document of `seq_len` tokens on average."""
        return 2 * 2 * self.n_heads * self.head_dim * (seq_len + 1) // 2
