"""Sizes and options of DeltaNet."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from refine_titan.models.decoder import whole_multiple
from refine_titan.models.delta_rule.args import FLAHybridArgs
from refine_titan.models.hf_format import FLA_FIXED, HFFormat


@dataclass
class DeltaNetArgs(FLAHybridArgs):
    """DeltaNet (arXiv 2406.06484) as flash-linear-attention implements it."""

    n_heads: int = 16
    expand_k: float = 1.0
    expand_v: float = 1.0
    conv_size: int = 4
    use_short_conv: bool = True
    use_beta: bool = True
    use_gate: bool = False
    allow_neg_eigval: bool = False
    qk_activation: Literal["silu", "relu", "elu", "identity"] = "silu"
    qk_norm: Literal["l2", "sum"] = "l2"

    hf_format: ClassVar[HFFormat] = HFFormat(
        model_type="delta_net",
        architecture="DeltaNetForCausalLM",
        keys={
            "n_heads": "num_heads",
            "attn": "attn",
            "expand_k": "expand_k",
            "expand_v": "expand_v",
            "conv_size": "conv_size",
            "use_short_conv": "use_short_conv",
            "use_beta": "use_beta",
            "use_gate": "use_gate",
            "allow_neg_eigval": "allow_neg_eigval",
            "qk_activation": "qk_activation",
            "qk_norm": "qk_norm",
        },
        tolerated=FLA_FIXED,
    )

    def __post_init__(self):
        super().__post_init__()
        self.key_dim = whole_multiple("dim * expand_k", self.dim * self.expand_k, "n_heads", self.n_heads)
        self.value_dim = whole_multiple("dim * expand_v", self.dim * self.expand_v, "n_heads", self.n_heads)

    def key_channels(self) -> int:
        return self.key_dim // self.n_heads

    def reach(self) -> int:
        return self.conv_size - 1 if self.use_short_conv else 0

    def mixer_flops_per_token(self) -> int:
        # Read, write and query of a [K, V] state per head, 2 operations each.
        return 6 * self.key_dim * self.value_dim // self.n_heads

    def tensor_parallel_sizes(self) -> dict[str, int]:
        return {"heads": self.n_heads} | self.attention_head_sizes()
