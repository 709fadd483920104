"""Sizes and options that GatedDeltaNet, KDA and GatedDeltaProduct share."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from refine_titan.config.type_checks import describe, matches
from refine_titan.models.attention.args import AttentionArgs
from refine_titan.models.decoder import DecoderArgs, whole_multiple
from refine_titan.models.hf_format import FLA_FIXED, HFFormat, LayerNames


@dataclass
class FLAHybridArgs(DecoderArgs):
    """A decoder of flash-linear-attention, in some layers of which attention may stand instead of the family's own mixer."""

    attn: dict | list[dict] | None = None
    """Those layers and their heads, or several such groups: `layers` (from 0) and `num_heads`, and as far as they differ from
    flash-linear-attention's defaults `num_kv_heads`, `qkv_bias` and `rope_theta`."""

    def __post_init__(self):
        super().__post_init__()
        self._attentions: dict[int, AttentionArgs] = {}
        for group in [self.attn] if isinstance(self.attn, dict) else self.attn or []:
            layers, attention = _read_attention(group, self.dim)
            doubled = [layer for layer, count in Counter([*self._attentions, *layers]).items() if count > 1]
            if doubled or not all(0 <= layer < self.n_layers for layer in layers):
                raise ValueError(f"attn.layers is {layers}; allowed: every layer once, from 0 to {self.n_layers - 1}")
            self._attentions |= dict.fromkeys(layers, attention)

    def attention_of(self, layer: int) -> AttentionArgs | None:
        return self._attentions.get(layer)

    def with_layers(self, n_layers: int) -> "FLAHybridArgs":
        groups = [self.attn] if isinstance(self.attn, dict) else self.attn or []
        kept = [group | {"layers": [layer for layer in group["layers"] if layer < n_layers]} for group in groups]
        return replace(self, n_layers=n_layers, attn=kept or None)


# Settings of a group of layers with attention, and their types.
_ATTENTION_SETTINGS = {"layers": list, "num_heads": int, "num_kv_heads": int | None, "qkv_bias": bool, "rope_theta": float}


def _read_attention(group: dict[str, Any], dim: int) -> tuple[list[int], AttentionArgs]:
    """Layers and heads of one group."""
    for key, value in group.items():
        if key == "window_size" and value is None:
            continue
        if key not in _ATTENTION_SETTINGS:
            raise ValueError(f"attn.{key} = {value!r} is not implemented; allowed: {', '.join(_ATTENTION_SETTINGS)}")
        if not matches(value, _ATTENTION_SETTINGS[key]):
            raise ValueError(f"attn.{key} is {value!r}; allowed: {describe(_ATTENTION_SETTINGS[key])}")
    if not {"layers", "num_heads"} <= group.keys() or not all(type(layer) is int for layer in group["layers"]):
        raise ValueError(f"attn is {group}; allowed: with layers (whole numbers) and num_heads")
    heads = group["num_heads"]
    head_dim = whole_multiple("dim", dim, "attn.num_heads", max(heads, 1)) // max(heads, 1)
    theta = group.get("rope_theta", 10000.0)
    if heads < 1 or (group.get("num_kv_heads") or heads) < 1 or not 0 < theta < float("inf"):
        raise ValueError(f"attn is {group}; allowed: positive heads and rope_theta")
    attention = AttentionArgs(
        dim,
        heads,
        group.get("num_kv_heads") or heads,
        head_dim,
        rotary_dim=head_dim,
        rope_theta=float(theta),
        qkv_bias=group.get("qkv_bias", False),
    )
    return group["layers"], attention


@dataclass
class DeltaRuleArgs(FLAHybridArgs):
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
        return {"heads": self.n_heads} | self.attention_head_sizes()

    def key_channels(self) -> int:
        return self.key_dim // self.n_heads

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
    model_type: str,
    architecture: str,
    keys: dict[str, str],
    tolerated: dict[str, tuple[Any, ...]] | None = None,
    earlier_keys: dict[str, str] | None = None,
    unread: tuple[str, ...] = (),
) -> HFFormat:
    """flash-linear-attention's names for `DeltaRuleArgs` and the decay gate, with a family's own keys."""
    shared = {"n_heads": "num_heads", "attn": "attn"}
    shared |= {name: name for name in ("head_dim", "expand_v", "conv_size", "use_short_conv", "allow_neg_eigval")}
    return HFFormat(
        model_type,
        architecture,
        shared | keys,
        tolerated=FLA_FIXED | (tolerated or {}),
        earlier_keys=earlier_keys or {},
        layers=LayerNames(renames=(("decay.A_log", "A_log"), ("decay.dt_bias", "dt_bias")), unread=unread),
        keep_in_float32=("A_log", "dt_bias"),
    )
