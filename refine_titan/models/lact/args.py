"""Sizes and options of LaCT."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from refine_titan.models.decoder import DecoderArgs, whole_multiple
from refine_titan.models.hf_format import Fusion, HFFormat, LayerNames


@dataclass
class LaCTArgs(DecoderArgs):
    """LaCT (arXiv 2505.23884) for language: sliding-window attention and large-chunk fast weights in one layer."""

    n_attn_heads: int = 32
    n_fast_heads: int = 4
    inter_multi: float = 1
    """Hidden channels of a fast network over its input channels."""
    chunk_size: int = 2048
    window_size: int = 2048
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    attn_qk_norm: bool = False
    qkv_silu: bool = True
    no_v_silu: bool = False
    lr_dim: int = 1
    """Learning rates that a token has for each fast weight: 1, or one per channel."""
    learnable_ttt_scale: bool = True
    use_momentum: bool = True
    use_muon: bool = False
    ttt_prenorm: bool = False
    ttt_nope: bool = False
    w0_w2_low_rank: int = field(default=-1, metadata={"may_be_negative": True})
    """Rank of the initial w0 and w2, to which half the identity is added; below 1 they are full matrices."""
    fw_init_gain: float = 0.5
    use_fused_kernel: bool = False
    """Whether the published code runs its fused kernel. Without Muon that kernel gives the same numbers; with Muon it orthogonalises the
    updates of w0 and w2 together, as one matrix, and so does this model."""
    initializer_range: float = 0.006
    newton_schulz_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of Muon's Newton-Schulz iterations, bfloat16 as published; not part of a checkpoint."""

    hf_format: ClassVar[HFFormat] = HFFormat(
        model_type="lact_swiglu",
        architecture="LaCTForCausalLM",
        library="LaCT",
        keys={
            "n_attn_heads": "num_attn_heads",
            "n_fast_heads": "num_lact_heads",
            "inter_multi": "inter_multi",
            "chunk_size": "lact_chunk_size",
            "window_size": "window_size",
            "rope_theta": "rope_theta",
            "qkv_bias": "qkv_bias",
            "attn_qk_norm": "attn_qk_norm",
            "qkv_silu": "qkv_silu",
            "no_v_silu": "no_v_silu",
            "lr_dim": "lr_dim",
            "learnable_ttt_scale": "learnable_ttt_scale",
            "use_momentum": "use_momentum",
            "use_muon": "use_muon",
            "ttt_prenorm": "ttt_prenorm",
            "ttt_nope": "ttt_nope",
            "w0_w2_low_rank": "w0_w2_low_rank",
            "fw_init_gain": "fw_init_gain",
            "use_fused_kernel": "use_fused_kernel",
        },
        fixed={"lr_parameterization": ("mamba",), "ttt_loss_type": ("dot_product",)},
        # The published code has no such bias, whatever its configurations say.
        tolerated={"attention_bias": (False,)},
        # Fast weights are kept in float32 here.
        irrelevant=frozenset({"elementwise_affine", "fp32_states"}),
        layers=LayerNames(
            renames=(("fast_weights.w0", "w0"), ("fast_weights.w1", "w1"), ("fast_weights.w2", "w2")),
            fused=(Fusion("qkv", ("q_proj", "k_proj", "v_proj")),),
        ),
    )

    def __post_init__(self):
        super().__post_init__()
        self.head_dim = whole_multiple("dim", self.dim, "n_attn_heads", self.n_attn_heads) // self.n_attn_heads
        self.fast_dim = whole_multiple("dim", self.dim, "n_fast_heads", self.n_fast_heads) // self.n_fast_heads
        self.fast_hidden_dim = int(self.fast_dim * self.inter_multi)
        if self.head_dim % 2:
            raise ValueError(f"dim / n_attn_heads is {self.head_dim}; rotary positions need an even number")
        if self.fast_hidden_dim < 1:
            raise ValueError(f"inter_multi is {self.inter_multi}; allowed: at least one hidden channel")
        if self.lr_dim != 1 and not self.lr_dim == self.fast_dim == self.fast_hidden_dim:
            raise ValueError(
                f"lr_dim is {self.lr_dim}; allowed: 1, or the {self.fast_dim} channels of a head if the fast network has as "
                f"many hidden ones (it has {self.fast_hidden_dim})"
            )

    def tensor_parallel_sizes(self) -> dict[str, int]:
        return {"attention heads": self.n_attn_heads, "fast-weight heads": self.n_fast_heads}

    def snapshot_stride(self, configured: int) -> int:
        """A state at every token is free: it refers to rows and weights that the pass keeps anyway."""
        return 1

    def reach(self) -> int:
        return self.window_size - 1

    def mixer_flops_per_token(self) -> int:
        attention = 4 * self.window_size * self.dim
        # Three products to apply, three to differentiate, three to write.
        fast = 18 * self.dim * self.fast_hidden_dim
        # Once a chunk, five iterations of three products for each weight.
        inner = (self.fast_dim, 2 * self.fast_hidden_dim) if self.use_fused_kernel else (self.fast_dim, self.fast_hidden_dim)
        shapes = [inner] * (1 if self.use_fused_kernel else 2) + [(self.fast_hidden_dim, self.fast_dim)]
        iterations = sum(2 * (2 * min(shape) ** 2 * max(shape) + min(shape) ** 3) for shape in shapes)
        muon = 5 * iterations * self.n_fast_heads // self.chunk_size if self.use_muon else 0
        return attention + fast + muon
