"""OLMo-Hybrid (Allen Institute for AI, 2026)."""

from refine_titan.models.delta_rule.gated import GatedDeltaRuleMixer
from refine_titan.models.family import Family
from refine_titan.models.olmo_hybrid.args import OlmoHybridArgs

OLMO_HYBRID = Family(
    args_class=OlmoHybridArgs,
    mixer_class=GatedDeltaRuleMixer,
    flavors={
        "debug": OlmoHybridArgs(
            vocab_size=288,
            dim=256,
            n_layers=4,
            intermediate_size=512,
            n_heads=4,
            n_v_heads=4,
            head_dim=48,
            head_v_dim=96,
            n_attn_heads=4,
            n_kv_heads=4,
            rope_theta=None,
        ),
        # transformers 5.19's defaults of OlmoHybridConfig, with the published `rope_parameters: {"rope_theta": null}`.
        "7B": OlmoHybridArgs(rope_theta=None),
    },
)
