"""Kimi Delta Attention (arXiv 2510.26692)."""

from refine_titan.models.family import Family
from refine_titan.models.kda.args import KDAArgs
from refine_titan.models.kda.mixer import KDAMixer

KDA = Family(
    args_class=KDAArgs,
    mixer_class=KDAMixer,
    flavors={
        "debug": KDAArgs(vocab_size=288, dim=256, n_layers=4, n_heads=4, head_dim=64, hidden_ratio=3),
        "1.3B": KDAArgs(vocab_size=32000, dim=2048, n_layers=24, n_heads=16),
    },
)
