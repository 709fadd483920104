"""Sizes and options of OLMo-Hybrid."""

from dataclasses import dataclass
from typing import Any, ClassVar

from refine_titan.models.attention.args import AttentionArgs
from refine_titan.models.decoder import whole_multiple
from refine_titan.models.delta_rule.layer_types import ATTENTION, LAYER_TYPES_KEYS, LayerTypesArgs
from refine_titan.models.hf_format import HFFormat, LayerNames

# Of values that only random weights depend on.
_INITIAL = frozenset({"linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor"})


@dataclass
class OlmoHybridArgs(LayerTypesArgs):
    """OLMo-Hybrid as transformers 5.19 implements it: attention with norms after it and q/k norms over all heads, beside the gated delta
    rule with norms before it and write strengths up to 2."""

    vocab_size: int = 100352
    dim: int = 3840
    n_layers: int = 32
    intermediate_size: int | None = 11008
    n_heads: int = 30
    n_v_heads: int = 30
    head_dim: int = 96
    head_v_dim: int = 192
    n_attn_heads: int = 30
    n_kv_heads: int = 30
    allow_neg_eigval: bool = True

    hf_format: ClassVar[HFFormat] = HFFormat(
        model_type="olmo_hybrid",
        architecture="OlmoHybridForCausalLM",
        library="transformers",
        keys=LAYER_TYPES_KEYS | {"allow_neg_eigval": "linear_allow_neg_eigval"},
        fixed={"hidden_act": ("silu", "swish"), "attention_bias": (False,)},
        tolerated={"attention_dropout": (0.0,)},
        irrelevant=_INITIAL,
        outside=(("tok_embeddings.", "model.embed_tokens."), ("norm.", "model.norm."), ("output.", "lm_head.")),
        layers=LayerNames(
            prefixes=(
                ("mixer_norm.", "attention_layer_norm."),
                ("mixer.", "linear_attn."),
                ("mlp_norm.", "feedforward_layer_norm."),
                ("mlp.", "mlp."),
            ),
            renames=(
                ("decay.A_log", "A_log"),
                ("decay.dt_bias", "dt_bias"),
            ),
        ),
        attention_layers=LayerNames(
            prefixes=(
                ("mixer_norm.", "post_attention_layernorm."),
                ("mixer.", "self_attn."),
                ("mlp_norm.", "post_feedforward_layernorm."),
                ("mlp.", "mlp."),
            )
        ),
        keep_in_float32=("A_log", "dt_bias"),
    )

    @property
    def output_norm_eps(self) -> float:
        # transformers' comment: the eps of flash-linear-attention's gated norm, whatever `rms_norm_eps` is.
        return 1e-5

    def norms_follow(self, layer: int) -> bool:
        return self.attention_of(layer) is not None

    def usual_layer_types(self) -> list[str]:
        kinds = super().usual_layer_types()
        return kinds if ATTENTION in kinds else [*kinds[:-1], ATTENTION]

    def build_attention(self) -> AttentionArgs:
        head_dim = whole_multiple("dim", self.dim, "n_attn_heads", self.n_attn_heads) // self.n_attn_heads
        return AttentionArgs(
            self.dim,
            self.n_attn_heads,
            self.n_kv_heads,
            head_dim,
            rotary_dim=head_dim if self.rope_theta else 0,
            rope_theta=self.rope_theta or 0.0,
            qk_norm="all heads",
            qk_norm_eps=self.norm_eps,
        )

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]):
        """Reads a `config.json`; sizes that it lacks follow from others, as in transformers."""
        config = dict(config)
        heads, dim = config.get("num_attention_heads", 30), config.get("hidden_size")
        usual = {"num_key_value_heads": heads, "linear_num_key_heads": heads, "linear_num_value_heads": heads}
        for key, value in usual.items():
            config[key] = value if config.get(key) is None else config[key]
        if config.get("linear_key_head_dim") is None and isinstance(dim, int) and isinstance(config["linear_num_key_heads"], int):
            config["linear_key_head_dim"] = int(0.75 * dim / max(config["linear_num_key_heads"], 1))
        if config.get("linear_value_head_dim") is None and isinstance(config.get("linear_key_head_dim"), int):
            config["linear_value_head_dim"] = 2 * config["linear_key_head_dim"]
        return super().from_hf_config(config)

    def to_hf_config(self) -> dict[str, Any]:
        # transformers' defaults are tokens that smaller vocabularies do not have.
        return super().to_hf_config() | {"pad_token_id": None, "eos_token_id": None}
