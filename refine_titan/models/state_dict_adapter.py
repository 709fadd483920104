"""Parameter names of Hugging Face checkpoints, both ways."""

import re
from typing import Any

import torch
from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from refine_titan.models.decoder import DecoderArgs

# How a parameter's name begins here and at Hugging Face; N is the layer.
_PREFIXES = (
    ("tok_embeddings.", "model.embeddings."),
    ("layers.N.mixer_norm.", "model.layers.N.attn_norm."),
    ("layers.N.mixer.", "model.layers.N.attn."),
    ("layers.N.mlp_norm.", "model.layers.N.mlp_norm."),
    ("layers.N.mlp.", "model.layers.N.mlp."),
    ("norm.", "model.norm."),
    ("output.", "lm_head."),
)


class DecoderStateDictAdapter(StateDictAdapter):
    """Renames parameters, and splits those that Hugging Face's model keeps as one, as the args' `hf_format` says. Layouts are the same
    on both sides. Tied embeddings are stored once.
    """

    def __init__(self, model_args: DecoderArgs, hf_assets_path: str | None = None):
        # An empty path means that there is no Hugging Face folder, not the current one.
        super().__init__(model_args, hf_assets_path or None)
        self.model_args = model_args

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The tensors under Hugging Face's names. All parts of a fused module must be given together."""
        hf: dict[str, Any] = {}
        for name, value in state_dict.items():
            whole, parts = self._fusion_of(name)
            if not parts:
                hf[self.hf_name(name)] = value
            elif name == parts[0]:
                hf[self.hf_name(whole)] = torch.cat([state_dict[part] for part in parts])
        if self.model_args.tie_word_embeddings:
            hf.pop("lm_head.weight", None)
        return hf

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """The tensors under our names."""
        prefixes = [(hf, ours) for ours, hf in self._prefixes()]
        state_dict: dict[str, Any] = {}
        for hf_name, value in hf_state_dict.items():
            name = _rename(hf_name, prefixes)
            _, parts = self._fusion_of(name)
            state_dict |= zip(parts, value.chunk(len(parts))) if parts else {name: value}.items()
        if self.model_args.tie_word_embeddings and "tok_embeddings.weight" in state_dict:
            state_dict["output.weight"] = state_dict["tok_embeddings.weight"]
        return state_dict

    def our_names(self, hf_name: str) -> tuple[str, ...]:
        """Our parameters that one of Hugging Face's is made of."""
        name = _rename(hf_name, [(hf, ours) for ours, hf in self._prefixes()])
        _, parts = self._fusion_of(name)
        return parts or (name,)

    def hf_name(self, name: str) -> str:
        """Hugging Face's name of one of our parameters."""
        return _rename(name, self._prefixes())

    def _fusion_of(self, name: str) -> tuple[str, tuple[str, ...]]:
        """Finds the fused parameter that `name` names, or is a part of.

        Returns:
            The fused parameter's name, under our prefix, and the names of its parts; `name` and nothing for any other parameter.
        """
        found = re.fullmatch(r"(layers\.\d+\.mixer\.)(.+)(\.\w+)", name)
        for whole, parts in self.model_args.hf_format.fused:
            if found and found[2] in (whole, *parts):
                return found[1] + whole + found[3], tuple(found[1] + part + found[3] for part in parts)
        return name, ()

    def _prefixes(self) -> list[tuple[str, str]]:
        exact = [(f"layers.N.mixer.{ours}", f"model.layers.N.attn.{hf}") for ours, hf in self.model_args.hf_format.renames]
        return [*exact, *_PREFIXES]


def _rename(name: str, prefixes: list[tuple[str, str]]) -> str:
    for old, new in prefixes:
        found = re.match(re.escape(old).replace("N", r"(\d+)"), name)
        if found:
            return new.replace("N", "".join(found.groups())) + name[found.end() :]
    raise ValueError(f"{name} is not a parameter of this model")
