"""Parameter names of flash-linear-attention's DeltaNet checkpoints, both ways."""

import re
from typing import Any

from torchtitan.protocols.state_dict_adapter import StateDictAdapter

# Ours and Hugging Face's beginnings of a parameter's name; N is the layer.
_PREFIXES = [
    ("tok_embeddings.", "model.embeddings."),
    ("layers.N.mixer_norm.", "model.layers.N.attn_norm."),
    ("layers.N.mixer.", "model.layers.N.attn."),
    ("layers.N.mlp_norm.", "model.layers.N.mlp_norm."),
    ("layers.N.mlp.", "model.layers.N.mlp."),
    ("norm.", "model.norm."),
    ("output.", "lm_head."),
]


class DeltaNetStateDictAdapter(StateDictAdapter):
    """Renames parameters; shapes and layouts are the same on both sides. Tied embeddings are stored once."""

    def __init__(self, model_args, hf_assets_path: str | None):
        # An empty path means that there is no Hugging Face folder, not the current one.
        super().__init__(model_args, hf_assets_path or None)
        self.model_args = model_args

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        hf = {_rename(name, _PREFIXES): value for name, value in state_dict.items()}
        if self.model_args.tie_word_embeddings:
            hf.pop("lm_head.weight", None)
        return hf

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = {_rename(name, [(hf, ours) for ours, hf in _PREFIXES]): value for name, value in hf_state_dict.items()}
        if self.model_args.tie_word_embeddings and "tok_embeddings.weight" in state_dict:
            state_dict["output.weight"] = state_dict["tok_embeddings.weight"]
        return state_dict


def _rename(name: str, prefixes: list[tuple[str, str]]) -> str:
    for old, new in prefixes:
        found = re.match(re.escape(old).replace("N", r"(\d+)"), name)
        if found:
            return new.replace("N", "".join(found.groups())) + name[found.end() :]
    raise ValueError(f"{name} is not a parameter of DeltaNet")
