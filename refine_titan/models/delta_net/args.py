"""Sizes and options of DeltaNet, in torchtitan's and in Hugging Face's terms."""

from dataclasses import dataclass
from typing import Any

from refine_titan.models.decoder import DecoderArgs

QK_ACTIVATIONS = ("silu", "relu", "elu", "identity")
QK_NORMS = ("l2", "sum")


@dataclass
class DeltaNetArgs(DecoderArgs):
    """DeltaNet (arXiv 2406.06484) as flash-linear-attention implements it."""

    n_heads: int = 8
    expand_k: float = 1.0
    expand_v: float = 1.0
    conv_size: int = 4
    use_short_conv: bool = True
    use_beta: bool = True
    use_gate: bool = False
    allow_neg_eigval: bool = False
    qk_activation: str = "silu"
    qk_norm: str = "l2"

    def __post_init__(self):
        if self.qk_activation not in QK_ACTIVATIONS:
            raise ValueError(f"qk_activation is {self.qk_activation!r}; allowed: {', '.join(QK_ACTIVATIONS)}")
        if self.qk_norm not in QK_NORMS:
            raise ValueError(f"qk_norm is {self.qk_norm!r}; allowed: {', '.join(QK_NORMS)}")
        for name, width in (("expand_k", self.dim * self.expand_k), ("expand_v", self.dim * self.expand_v)):
            if width != round(width) or round(width) % self.n_heads:
                raise ValueError(
                    f"dim * {name} must be a whole multiple of n_heads ({self.n_heads}), got {self.dim} * {getattr(self, name)}"
                )

    @property
    def key_dim(self) -> int:
        return round(self.dim * self.expand_k)

    @property
    def value_dim(self) -> int:
        return round(self.dim * self.expand_v)

    def build_mixer(self):
        from refine_titan.models.delta_net.mixer import DeltaNetMixer

        return DeltaNetMixer(self)

    def mixer_flops_per_token(self) -> int:
        # Read, write and query of a [K, V] state per head, 2 operations each.
        return 6 * self.n_heads * (self.key_dim // self.n_heads) * (self.value_dim // self.n_heads)

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]) -> "DeltaNetArgs":
        """Reads a Hugging Face `config.json`.

        Raises:
            ValueError: if the file is of another model, or asks for something this family does not have.
        """
        if config.get("model_type") != "delta_net":
            raise ValueError(f"config.json: model_type is {config.get('model_type')!r}, expected 'delta_net'")
        for key in ("attn", "attnres_block_size"):
            if config.get(key) is not None:
                raise ValueError(f"config.json: {key} = {config[key]!r} is not supported (only null)")
        if config.get("hidden_act", "swish") not in ("swish", "silu"):
            raise ValueError(f"config.json: hidden_act is {config['hidden_act']!r}; allowed: swish")
        required = ("vocab_size", "hidden_size", "num_heads", "num_hidden_layers")
        missing = [key for key in required if key not in config]
        if missing:
            raise ValueError(f"config.json: missing {', '.join(missing)}")
        hidden_ratio = config.get("hidden_ratio")
        return cls(
            vocab_size=config["vocab_size"],
            dim=config["hidden_size"],
            n_layers=config["num_hidden_layers"],
            n_heads=config["num_heads"],
            hidden_ratio=4 if hidden_ratio is None else hidden_ratio,
            intermediate_size=config.get("intermediate_size"),
            norm_eps=config.get("norm_eps", 1e-6),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            initializer_range=config.get("initializer_range", 0.02),
            expand_k=config.get("expand_k", 1.0),
            expand_v=config.get("expand_v", 1.0),
            conv_size=config.get("conv_size", 4),
            use_short_conv=config.get("use_short_conv", True),
            use_beta=config.get("use_beta", True),
            use_gate=config.get("use_gate", False),
            allow_neg_eigval=config.get("allow_neg_eigval", False),
            qk_activation=config.get("qk_activation", "silu"),
            qk_norm=config.get("qk_norm", "l2"),
        )
