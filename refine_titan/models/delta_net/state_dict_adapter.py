"""Parameter names of flash-linear-attention's DeltaNet checkpoints, both ways."""

import re
from typing import Any

from torchtitan.protocols.state_dict_adapter import StateDictAdapter

_TO_HF = [
    (r"^tok_embeddings\.weight$", "model.embeddings.weight"),
    (r"^norm\.weight$", "model.norm.weight"),
    (r"^output\.weight$", "lm_head.weight"),
    (r"^layers\.(\d+)\.mixer_norm\.", r"model.layers.\1.attn_norm."),
    (r"^layers\.(\d+)\.mixer\.", r"model.layers.\1.attn."),
    (r"^layers\.(\d+)\.(mlp_norm|mlp)\.", r"model.layers.\1.\2."),
]
_FROM_HF = [
    (r"^model\.embeddings\.weight$", "tok_embeddings.weight"),
    (r"^model\.norm\.weight$", "norm.weight"),
    (r"^lm_head\.weight$", "output.weight"),
    (r"^model\.layers\.(\d+)\.attn_norm\.", r"layers.\1.mixer_norm."),
    (r"^model\.layers\.(\d+)\.attn\.", r"layers.\1.mixer."),
    (r"^model\.layers\.(\d+)\.(mlp_norm|mlp)\.", r"layers.\1.\2."),
]


class DeltaNetStateDictAdapter(StateDictAdapter):
    """Renames parameters; shapes and layouts are the same on both sides. Tied embeddings are stored once."""

    def __init__(self, model_args, hf_assets_path: str | None):
        # An empty path means that there is no Hugging Face folder, not the current one.
        super().__init__(model_args, hf_assets_path or None)
        self.model_args = model_args

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        hf = {_rename(name, _TO_HF): value for name, value in state_dict.items()}
        if self.model_args.tie_word_embeddings:
            hf.pop("lm_head.weight", None)
        return hf

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = {_rename(name, _FROM_HF): value for name, value in hf_state_dict.items()}
        if self.model_args.tie_word_embeddings and "tok_embeddings.weight" in state_dict:
            state_dict["output.weight"] = state_dict["tok_embeddings.weight"]
        return state_dict


def _rename(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    raise ValueError(f"{name} is not a parameter of DeltaNet")
