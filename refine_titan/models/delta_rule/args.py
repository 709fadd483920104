"""Sizes and options that GatedDeltaNet, KDA and GatedDeltaProduct share."""

from dataclasses import dataclass
from typing import Any

from refine_titan.models.decoder import DecoderArgs, whole_multiple
from refine_titan.models.hf_format import FLA_FIXED, HFFormat


@dataclass
class DeltaRuleArgs(DecoderArgs):
    """Heads of `head_dim` key channels and `head_dim * expand_v` value channels, with decays that stay float32."""

    n_heads: int = 6
    head_dim: int = 256
    expand_v: float = 2.0
    conv_size: int = 4
    use_short_conv: bool = True
    allow_neg_eigval: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.head_v_dim = whole_multiple("head_dim * expand_v", self.head_dim * self.expand_v)
        self.key_dim = self.n_heads * self.head_dim
        self.value_dim = self.num_value_heads * self.head_v_dim

    @property
    def num_value_heads(self) -> int:
        return self.n_heads

    def tensor_parallel_sizes(self) -> dict[str, int]:
        return {"heads": self.n_heads}

    def reach(self) -> int:
        return self.conv_size - 1 if self.use_short_conv else 0

    def mixer_flops_per_token(self) -> int:
        # Decay, read, write and query of a [K, V] state per head.
        return 7 * self.head_dim * self.value_dim


@dataclass
class GroupedValueArgs(DeltaRuleArgs):
    """`DeltaRuleArgs` with value heads in groups that share a key head."""

    n_v_heads: int | None = None
    """Value heads, a multiple of `n_heads`. None: as many as `n_heads`."""

    @property
    def num_value_heads(self) -> int:
        return whole_multiple("n_v_heads", self.n_v_heads or self.n_heads, "n_heads", self.n_heads)


def delta_rule_format(
    model_type: str, architecture: str, keys: dict[str, str], tolerated: dict[str, tuple[Any, ...]] | None = None
) -> HFFormat:
    """flash-linear-attention's names for `DeltaRuleArgs` and the decay gate, with a family's own keys."""
    shared = {"n_heads": "num_heads"}
    shared |= {name: name for name in ("head_dim", "expand_v", "conv_size", "use_short_conv", "allow_neg_eigval")}
    return HFFormat(
        model_type,
        architecture,
        shared | keys,
        tolerated=FLA_FIXED | (tolerated or {}),
        renames=(("decay.A_log", "A_log"), ("decay.dt_bias", "dt_bias")),
        keep_in_float32=("A_log", "dt_bias"),
    )
