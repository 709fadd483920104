"""Sizes of transformers' hybrids, whose `layer_types` say in which layers the gated delta rule stands and in which attention."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from refine_titan.models.attention.args import AttentionArgs
from refine_titan.models.decoder import DecoderArgs, whole_multiple

RECURRENT, ATTENTION = "linear_attention", "full_attention"

# Fields that transformers keeps in `rope_parameters`, under the same names.
_ROTATION = ("rope_theta", "partial_rotary_factor")

# Our field and transformers' key.
LAYER_TYPES_KEYS = {
    "hidden_ratio": "",
    "norm_eps": "rms_norm_eps",
    "layer_types": "layer_types",
    "n_heads": "linear_num_key_heads",
    "n_v_heads": "linear_num_value_heads",
    "head_dim": "linear_key_head_dim",
    "head_v_dim": "linear_value_head_dim",
    "conv_size": "linear_conv_kernel_dim",
    "n_attn_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "rope_theta": "rope_theta",
}


@dataclass
class LayerTypesArgs(DecoderArgs):
    """Three layers of the gated delta rule, then one of attention, unless `layer_types` says otherwise.

    Raises:
        ValueError: if `layer_types` is not of every layer, or heads do not divide.
    """

    layer_types: list[str] | None = None
    """The kind of every layer, `linear_attention` or `full_attention`. None: attention in every fourth one."""
    n_heads: int = 16
    """Key heads of the delta rule."""
    n_v_heads: int = 32
    """Value heads of the delta rule, a multiple of `n_heads`."""
    head_dim: int = 128
    head_v_dim: int = 128
    conv_size: int = 4
    n_attn_heads: int = 16
    n_kv_heads: int = 4
    rope_theta: float | None = 10000.0
    """Base of the rotation of attention; None for no rotation."""

    use_short_conv: ClassVar[bool] = True
    use_gate: ClassVar[bool] = True
    output_gate_activation: ClassVar[str] = "swish"

    def __post_init__(self):
        super().__post_init__()
        usual = self.usual_layer_types()
        kinds = usual if self.layer_types is None else self.layer_types
        if len(kinds) != self.n_layers or not set(kinds) <= {RECURRENT, ATTENTION}:
            raise ValueError(f"layer_types is {kinds!r:.200}; allowed: {RECURRENT!r} or {ATTENTION!r} for each of {self.n_layers} layers")
        self._kinds = list(kinds)
        if self._kinds == usual:
            self.layer_types = None
        self.num_value_heads = whole_multiple("n_v_heads", self.n_v_heads, "n_heads", self.n_heads)
        self.key_dim, self.value_dim = self.n_heads * self.head_dim, self.n_v_heads * self.head_v_dim
        self._attention = self.build_attention()

    @abstractmethod
    def build_attention(self) -> AttentionArgs:
        """The attention of the layers that have it."""

    def usual_layer_types(self) -> list[str]:
        """The kinds of the layers where nothing is said."""
        return [RECURRENT if (layer + 1) % 4 else ATTENTION for layer in range(self.n_layers)]

    def attention_of(self, layer: int) -> AttentionArgs | None:
        return self._attention if self._kinds[layer] == ATTENTION else None

    def with_layers(self, n_layers: int) -> "LayerTypesArgs":
        return replace(self, n_layers=n_layers, layer_types=self._kinds[:n_layers])

    @property
    def output_norm_eps(self) -> float:
        """Of the norm after the delta rule."""
        return self.norm_eps

    def tensor_parallel_sizes(self) -> dict[str, int]:
        return {"key heads of the delta rule": self.n_heads} | self.attention_head_sizes()

    def key_channels(self) -> int:
        return self.key_dim // self.n_heads

    def reach(self) -> int:
        return self.conv_size - 1

    def mixer_flops_per_token(self) -> int:
        # Decay, read, write and query of a [K, V] state per head.
        return 7 * self.head_dim * self.value_dim

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]):
        config = dict(config)
        rope = config.pop("rope_parameters", None)
        if rope is not None:
            config |= cls._read_rotation(rope)
        if config.get("layer_types", ()) is None:
            del config["layer_types"]
        return super().from_hf_config(config)

    @classmethod
    def with_overrides(cls, config: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        if "text_config" in config:
            here = {name: value for name, value in values.items() if cls.hf_format.all_keys.get(name) in config}
            return super().with_overrides(config, here) | {"text_config": cls.with_overrides(config["text_config"], values)}
        if "n_layers" in values:
            # Options change the number of layers only where their kinds are the usual ones, which need not be listed.
            config = {key: value for key, value in config.items() if key != "layer_types"}
        turned = {name: values[name] for name in _ROTATION if name in values}
        others = {name: value for name, value in values.items() if name not in turned}
        rope = {"rope_parameters": (config.get("rope_parameters") or {}) | turned} if turned else {}
        return super().with_overrides(config, others) | rope

    def to_hf_config(self) -> dict[str, Any]:
        config = super().to_hf_config()
        names = [name for name in _ROTATION if name in config]
        rope = {"rope_type": "default"} | {name: config.pop(name) for name in names}
        return config | {"layer_types": self._kinds, "rope_parameters": rope}

    @staticmethod
    def _read_rotation(rope: Any) -> dict[str, Any]:
        """`rope_parameters` as keys of their own. For text the three parts of a rotation for images turn alike."""
        allowed = {"rope_theta", "partial_rotary_factor", "rope_type", "mrope_section", "mrope_interleaved"}
        if not isinstance(rope, dict) or not rope.keys() <= allowed:
            raise ValueError(f"config.json: rope_parameters is {rope!r}; allowed: {', '.join(sorted(allowed))}")
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"config.json: rope_parameters.rope_type is {rope['rope_type']!r}; allowed: 'default'")
        return {name: rope[name] for name in _ROTATION if name in rope}
