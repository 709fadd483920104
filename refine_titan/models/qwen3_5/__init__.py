"""Qwen3.5's dense models (2026): text."""

from refine_titan.models.delta_rule.gated import GatedDeltaRuleMixer
from refine_titan.models.family import Family
from refine_titan.models.qwen3_5.args import Qwen35Args

_PUBLISHED = dict(rope_theta=1e7)

QWEN3_5 = Family(
    args_class=Qwen35Args,
    mixer_class=GatedDeltaRuleMixer,
    flavors={
        "debug": Qwen35Args(
            vocab_size=288,
            dim=256,
            n_layers=4,
            intermediate_size=512,
            n_heads=2,
            n_v_heads=4,
            head_dim=64,
            head_v_dim=64,
            n_attn_heads=4,
            n_kv_heads=2,
            attn_head_dim=64,
            tie_word_embeddings=True,
            **_PUBLISHED,
        ),
        # Sizes of Qwen/Qwen3.5-0.8B, -4B, -9B and -27B, each from two places that agree. 0.8B and 27B: THUDM/slime,
        # scripts/models/qwen3.5-0.8B.sh and qwen3.5-27B.sh, and tests of public repositories that quote config.json. 9B: transformers
        # 5.19's defaults of Qwen3_5TextConfig, and such tests. 4B: such tests; tied embeddings by its published 4.54e9 parameters,
        # 0.33e9 of them the vision tower's. 2B has no preset: nothing found tells whether its embeddings are tied.
        "0.8B": Qwen35Args(
            dim=1024,
            n_layers=24,
            intermediate_size=3584,
            n_v_heads=16,
            n_attn_heads=8,
            n_kv_heads=2,
            tie_word_embeddings=True,
            **_PUBLISHED,
        ),
        "4B": Qwen35Args(dim=2560, intermediate_size=9216, tie_word_embeddings=True, **_PUBLISHED),
        "9B": Qwen35Args(**_PUBLISHED),
        "27B": Qwen35Args(dim=5120, n_layers=64, intermediate_size=17408, n_v_heads=48, n_attn_heads=24, **_PUBLISHED),
    },
)
