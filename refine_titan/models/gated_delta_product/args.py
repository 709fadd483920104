"""Sizes and options of GatedDeltaProduct."""

from dataclasses import dataclass
from typing import ClassVar

from refine_titan.models.decoder import DecoderArgs, whole_multiple
from refine_titan.models.hf_config import FLA_FIXED, HFConfigFormat


@dataclass
class GatedDeltaProductArgs(DecoderArgs):
    """GatedDeltaProduct (arXiv 2502.10297) as flash-linear-attention implements it."""

    n_layers: int = 21
    n_heads: int = 6
    head_dim: int = 256
    expand_v: float = 2.0
    conv_size: int = 4
    use_short_conv: bool = True
    use_output_gate: bool = True
    use_forget_gate: bool = False
    allow_neg_eigval: bool = False
    num_householder: int = 1
    """Delta-rule updates of a token."""

    hf_format: ClassVar[HFConfigFormat] = HFConfigFormat(
        model_type="gated_deltaproduct",
        architecture="GatedDeltaProductForCausalLM",
        keys={
            "n_heads": "num_heads",
            "head_dim": "head_dim",
            "expand_v": "expand_v",
            "conv_size": "conv_size",
            "use_short_conv": "use_short_conv",
            "use_output_gate": "use_output_gate",
            "use_forget_gate": "use_forget_gate",
            "allow_neg_eigval": "allow_neg_eigval",
            "num_householder": "num_householder",
        },
        tolerated=FLA_FIXED | {"num_v_heads": (None,)},
    )
    keep_in_float32: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias")

    def __post_init__(self):
        super().__post_init__()
        self.head_v_dim = whole_multiple("head_dim * expand_v", self.head_dim * self.expand_v)
        self.key_dim = self.n_heads * self.head_dim
        self.value_dim = self.n_heads * self.head_v_dim

    def build_mixer(self):
        from refine_titan.models.gated_delta_product.mixer import GatedDeltaProductMixer

        return GatedDeltaProductMixer(self)

    def mixer_flops_per_token(self) -> int:
        # One decay and query, and a read and a write per update, of a [K, V] state per head.
        return (3 + 4 * self.num_householder) * self.head_dim * self.value_dim
