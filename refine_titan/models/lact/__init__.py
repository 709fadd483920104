"""LaCT: flavors, and the pieces that a TrainSpec needs."""

from refine_titan.models.lact.args import LaCTArgs
from refine_titan.models.lact.state_dict_adapter import LaCTStateDictAdapter

_PUBLISHED = dict(vocab_size=32000, n_layers=24, n_attn_heads=24, rope_theta=1e6, attn_qk_norm=True, use_muon=True, w0_w2_low_rank=32)

FLAVORS = {
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
    # Published checkpoints differ in their flags: sizes and flags of a checkpoint come from its config.json.
    "760M": LaCTArgs(dim=1536, **_PUBLISHED),
    "3B": LaCTArgs(dim=3072, **_PUBLISHED),
}

ARGS = LaCTArgs
STATE_DICT_ADAPTER = LaCTStateDictAdapter
