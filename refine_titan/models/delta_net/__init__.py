"""DeltaNet (arXiv 2406.06484)."""

from refine_titan.models.delta_net.args import DeltaNetArgs
from refine_titan.models.delta_net.mixer import DeltaNetMixer
from refine_titan.models.family import Family

DELTA_NET = Family(
    args_class=DeltaNetArgs,
    mixer_class=DeltaNetMixer,
    flavors={
        # Byte-level vocabulary (256 bytes and an end-of-text token), padded to a multiple of 32.
        "debug": DeltaNetArgs(vocab_size=288, dim=256, n_layers=4, n_heads=4, hidden_ratio=3),
        "340M": DeltaNetArgs(vocab_size=32000, dim=1024, n_layers=24, n_heads=8),
        "1.3B": DeltaNetArgs(vocab_size=32000, dim=2048, n_layers=24, n_heads=16),
    },
)
