"""GatedDeltaNet (arXiv 2412.06464)."""

from refine_titan.models.delta_rule.gated import GatedDeltaRuleMixer
from refine_titan.models.family import Family
from refine_titan.models.gated_delta_net.args import GatedDeltaNetArgs

GATED_DELTA_NET = Family(
    args_class=GatedDeltaNetArgs,
    mixer_class=GatedDeltaRuleMixer,
    flavors={
        "debug": GatedDeltaNetArgs(vocab_size=288, dim=256, n_layers=4, n_heads=3, head_dim=64, hidden_ratio=3),
        "340M": GatedDeltaNetArgs(vocab_size=32000, dim=1024, n_layers=21, n_heads=3),
        "1.3B": GatedDeltaNetArgs(vocab_size=32000, dim=2048, n_layers=21, n_heads=6),
    },
)
