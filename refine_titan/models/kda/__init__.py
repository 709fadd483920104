"""Kimi Delta Attention: flavors, and the pieces that a TrainSpec needs."""

from refine_titan.models.kda.args import KDAArgs
from refine_titan.models.kda.state_dict_adapter import KDAStateDictAdapter

FLAVORS = {
    "debug": KDAArgs(vocab_size=288, dim=256, n_layers=4, n_heads=4, head_dim=64, hidden_ratio=3),
    "1.3B": KDAArgs(vocab_size=32000, dim=2048, n_layers=24, n_heads=16),
}

ARGS = KDAArgs
STATE_DICT_ADAPTER = KDAStateDictAdapter
