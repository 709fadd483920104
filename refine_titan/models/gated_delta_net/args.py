"""Sizes and options of GatedDeltaNet."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from refine_titan.models.decoder import DecoderArgs, whole_multiple
from refine_titan.models.hf_config import FLA_FIXED, HFConfigFormat


@dataclass
class GatedDeltaNetArgs(DecoderArgs):
    """GatedDeltaNet (arXiv 2412.06464) as flash-linear-attention implements it."""

    n_layers: int = 21
    n_heads: int = 6
    n_v_heads: int | None = None
    """Value heads, a multiple of `n_heads`; each key head serves a group of them. None: as many as `n_heads`."""
    head_dim: int = 256
    expand_v: float = 2.0
    conv_size: int = 4
    use_short_conv: bool = True
    use_gate: bool = True
    allow_neg_eigval: bool = False
    output_gate_activation: Literal["swish", "silu", "sigmoid"] = "swish"

    hf_format: ClassVar[HFConfigFormat] = HFConfigFormat(
        model_type="gated_deltanet",
        architecture="GatedDeltaNetForCausalLM",
        keys={
            "n_heads": "num_heads",
            "n_v_heads": "num_v_heads",
            "head_dim": "head_dim",
            "expand_v": "expand_v",
            "conv_size": "conv_size",
            "use_short_conv": "use_short_conv",
            "use_gate": "use_gate",
            "allow_neg_eigval": "allow_neg_eigval",
            "output_gate_activation": "output_gate_activation",
        },
        tolerated=FLA_FIXED | {"use_mamba_gate": (True,)},
    )
    keep_in_float32: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias")

    def __post_init__(self):
        super().__post_init__()
        self.num_value_heads = whole_multiple("n_v_heads", self.n_v_heads or self.n_heads, "n_heads", self.n_heads)
        self.head_v_dim = whole_multiple("head_dim * expand_v", self.head_dim * self.expand_v)
        self.key_dim = self.n_heads * self.head_dim
        self.value_dim = self.num_value_heads * self.head_v_dim

    def build_mixer(self):
        from refine_titan.models.gated_delta_net.mixer import GatedDeltaNetMixer

        return GatedDeltaNetMixer(self)

    def mixer_flops_per_token(self) -> int:
        # Decay, read, write and query of a [K, V] state per head.
        return 7 * self.head_dim * self.value_dim
