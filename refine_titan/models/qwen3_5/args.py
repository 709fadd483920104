"""Sizes and options of Qwen3.5's dense models."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from refine_titan.config.sections import JobConfig
from refine_titan.files.limits import read_small_file
from refine_titan.models.attention.args import AttentionArgs
from refine_titan.models.delta_rule.layer_types import LAYER_TYPES_KEYS, LayerTypesArgs
from refine_titan.models.hf_format import Fusion, HFFormat, LayerNames

_SIZES = ("key_dim", "key_dim", "value_dim")
_NORMS = (("mixer_norm.", "input_layernorm."), ("mlp_norm.", "post_attention_layernorm."), ("mlp.", "mlp."))
# What a published config.json says beside the text model.
_WRAPPER_KEYS = frozenset(
    "architectures model_type text_config vision_config image_token_id video_token_id vision_start_token_id vision_end_token_id "
    "tie_word_embeddings transformers_version dtype torch_dtype bos_token_id eos_token_id pad_token_id language_model_only".split()
)


@dataclass
class Qwen35Args(LayerTypesArgs):
    """Qwen3.5 (dense, text) as transformers 5.19 implements it: gated attention with q/k norms and a partial rotation beside the gated
    delta rule; norms multiply by 1 + their weight."""

    vocab_size: int = 248320
    dim: int = 4096
    n_layers: int = 32
    intermediate_size: int | None = 12288
    attn_head_dim: int = 256
    partial_rotary_factor: float = 0.25
    is_part_of_larger: bool = field(default=False, metadata={"is_option": False})
    """Whether checkpoints are those of the model with a vision tower, `Qwen3_5ForConditionalGeneration`."""

    offset_norms: ClassVar[bool] = True
    allow_neg_eigval: ClassVar[bool] = False

    hf_format: ClassVar[HFFormat] = HFFormat(
        model_type="qwen3_5_text",
        architecture="Qwen3_5ForCausalLM",
        library="transformers",
        keys=LAYER_TYPES_KEYS | {"attn_head_dim": "head_dim", "partial_rotary_factor": "partial_rotary_factor"},
        fixed={"hidden_act": ("silu", "swish"), "attention_bias": (False,)},
        tolerated={"attn_output_gate": (True,), "full_attention_interval": (4,), "attention_dropout": (0.0,), "mlp_only_layers": ([],)},
        irrelevant=frozenset({"mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"}),
        outside=(("tok_embeddings.", "model.embed_tokens."), ("norm.", "model.norm."), ("output.", "lm_head.")),
        layers=LayerNames(
            prefixes=(*_NORMS, ("mixer.", "linear_attn.")),
            renames=(
                ("decay.A_log", "A_log"),
                ("decay.dt_bias", "dt_bias"),
                ("a_proj.", "in_proj_a."),
                ("b_proj.", "in_proj_b."),
                ("g_proj.", "in_proj_z."),
                ("o_norm.", "norm."),
                ("o_proj.", "out_proj."),
            ),
            fused=(
                Fusion("in_proj_qkv", ("q_proj", "k_proj", "v_proj"), _SIZES),
                Fusion("conv1d", ("q_conv1d", "k_conv1d", "v_conv1d"), _SIZES),
            ),
        ),
        attention_layers=LayerNames(
            prefixes=(*_NORMS, ("mixer.", "self_attn.")), fused=(Fusion("q_proj", ("q_proj", "g_proj"), groups="n_attn_heads"),)
        ),
        other_model_types=("qwen3_5",),
        carried=("model.visual.", "mtp."),
        keep_in_float32=("A_log", "dt_bias"),
    )

    def build_attention(self) -> AttentionArgs:
        return AttentionArgs(
            self.dim,
            self.n_attn_heads,
            self.n_kv_heads,
            self.attn_head_dim,
            rotary_dim=int(self.attn_head_dim * self.partial_rotary_factor) if self.rope_theta else 0,
            rope_theta=self.rope_theta or 0.0,
            qk_norm="head",
            qk_norm_eps=self.norm_eps,
            offset_norm=True,
            output_gate=True,
        )

    def update_from_config(self, job_config: JobConfig, **kwargs) -> None:
        """Takes `[model] options`, and whether the published weights that a run starts from are those of the model with the vision
        tower."""
        super().update_from_config(job_config, **kwargs)
        path = Path(job_config.checkpoint.initial_load_path or job_config.model.hf_assets_path, "config.json")
        if job_config.checkpoint.initial_load_in_hf and path.is_file():  # what is missing is refused by whoever loads it
            config = json.loads(read_small_file(path))
            self.is_part_of_larger = config.get("model_type") in self.hf_format.other_model_types

    @property
    def hf_prefix(self) -> str:
        return "model.language_model." if self.is_part_of_larger else "model."

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]):
        """Reads the `config.json` of a text model, or of a model with a vision tower, whose `text_config` it is."""
        if config.get("model_type") != "qwen3_5":
            return super().from_hf_config(config)
        text = config.get("text_config")
        if not isinstance(text, dict):
            raise ValueError(f"config.json: text_config is {text!r}; allowed: the settings of the text model")
        unknown = sorted(config.keys() - _WRAPPER_KEYS)
        if unknown:
            raise ValueError(f"config.json: {unknown[0]} = {config[unknown[0]]!r} is not a setting of qwen3_5 known here")
        tied = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
        return replace(super().from_hf_config(text | {"model_type": cls.hf_format.model_type} | tied), is_part_of_larger=True)
