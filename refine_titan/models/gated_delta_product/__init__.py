"""GatedDeltaProduct (arXiv 2502.10297)."""

from refine_titan.models.family import Family
from refine_titan.models.gated_delta_product.args import GatedDeltaProductArgs
from refine_titan.models.gated_delta_product.mixer import GatedDeltaProductMixer

_COMMON = dict(use_forget_gate=True, allow_neg_eigval=True, num_householder=2)

GATED_DELTA_PRODUCT = Family(
    args_class=GatedDeltaProductArgs,
    mixer_class=GatedDeltaProductMixer,
    flavors={
        "debug": GatedDeltaProductArgs(vocab_size=288, dim=256, n_layers=4, n_heads=3, head_dim=64, hidden_ratio=3, **_COMMON),
        "1.3B": GatedDeltaProductArgs(vocab_size=32000, dim=2048, n_layers=21, n_heads=6, **_COMMON),
    },
)
