"""LaCT (arXiv 2505.23884): sliding-window attention and large-chunk fast weights in one layer."""

from refine_titan.models.family import Family
from refine_titan.models.lact.args import LaCTArgs
from refine_titan.models.lact.mixer import LaCTMixer

# What the published configurations of 760M say; that with Muon differs from the other in nothing else.
_PUBLISHED = dict(vocab_size=32000, n_layers=24, n_attn_heads=24, rope_theta=1e6, w0_w2_low_rank=32, initializer_range=0.02)

LACT = Family(
    args_class=LaCTArgs,
    mixer_class=LaCTMixer,
    flavors={
        "debug": LaCTArgs(
            vocab_size=288,
            dim=256,
            n_layers=4,
            n_attn_heads=4,
            n_fast_heads=2,
            hidden_ratio=3,
            chunk_size=256,
            window_size=128,
            use_muon=True,
            w0_w2_low_rank=16,
            initializer_range=0.02,
        ),
        "760M": LaCTArgs(dim=1536, **_PUBLISHED),
        "760M_muon": LaCTArgs(dim=1536, use_muon=True, **_PUBLISHED),
        # With the options of 760M; those of a checkpoint come from its config.json.
        "3B": LaCTArgs(dim=3072, **_PUBLISHED),
    },
)
