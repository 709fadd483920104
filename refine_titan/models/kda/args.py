"""Sizes and options of KDA."""

from dataclasses import dataclass, field
from typing import ClassVar

from refine_titan.models.decoder import DecoderArgs, whole_multiple
from refine_titan.models.hf_config import FLA_FIXED, HFConfigFormat


@dataclass
class KDAArgs(DecoderArgs):
    """Kimi Delta Attention (arXiv 2510.26692) as flash-linear-attention implements it."""

    n_heads: int = 16
    n_v_heads: int | None = None
    """Value heads, a multiple of `n_heads`; each key head serves a group of them. None: as many as `n_heads`."""
    head_dim: int = 128
    expand_v: float = 1.0
    conv_size: int = 4
    use_short_conv: bool = True
    allow_neg_eigval: bool = False
    safe_gate: bool = False
    """Whether log decays are known to lie in `lower_bound`..0; needs a `lower_bound` of at least -5."""
    lower_bound: float | None = field(default=None, metadata={"may_be_negative": True})

    hf_format: ClassVar[HFConfigFormat] = HFConfigFormat(
        model_type="kda",
        architecture="KDAForCausalLM",
        keys={
            "n_heads": "num_heads",
            "n_v_heads": "num_v_heads",
            "head_dim": "head_dim",
            "expand_v": "expand_v",
            "conv_size": "conv_size",
            "use_short_conv": "use_short_conv",
            "allow_neg_eigval": "allow_neg_eigval",
            "safe_gate": "safe_gate",
            "lower_bound": "lower_bound",
        },
        tolerated=FLA_FIXED,
    )
    keep_in_float32: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias")

    def __post_init__(self):
        super().__post_init__()
        if self.lower_bound is not None and not self.lower_bound < 0:
            raise ValueError(f"lower_bound is {self.lower_bound}; allowed: below 0, or None")
        if self.safe_gate and (self.lower_bound is None or self.lower_bound < -5):
            raise ValueError(f"safe_gate needs a lower_bound from -5 to below 0, got {self.lower_bound}")
        self.num_value_heads = whole_multiple("n_v_heads", self.n_v_heads or self.n_heads, "n_heads", self.n_heads)
        self.head_v_dim = whole_multiple("head_dim * expand_v", self.head_dim * self.expand_v)
        self.key_dim = self.n_heads * self.head_dim
        self.value_dim = self.num_value_heads * self.head_v_dim

    def build_mixer(self):
        from refine_titan.models.kda.mixer import KDAMixer

        return KDAMixer(self)

    def mixer_flops_per_token(self) -> int:
        # Decay, read, write and query of a [K, V] state per head.
        return 7 * self.head_dim * self.value_dim
