"""Parameter names of Hugging Face checkpoints, both ways."""

import re
from typing import Any

from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from refine_titan.models.decoder import DecoderArgs
from refine_titan.models.hf_format import Fusion, LayerNames


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
            fusion, whole, parts = self._fusion_of(name)
            if fusion is None:
                hf[self.hf_name(name)] = value
            elif name == parts[0]:
                hf[self.hf_name(whole)] = fusion.join([state_dict[part] for part in parts], self.model_args)
        if self.model_args.tie_word_embeddings:
            hf.pop("lm_head.weight", None)
        return hf

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """The tensors under our names."""
        state_dict: dict[str, Any] = {}
        for hf_name, value in hf_state_dict.items():
            name = self._our_name(hf_name)
            fusion, _, parts = self._fusion_of(name)
            state_dict |= {name: value} if fusion is None else dict(zip(parts, fusion.split(value, self.model_args)))
        if self.model_args.tie_word_embeddings and "tok_embeddings.weight" in state_dict:
            state_dict["output.weight"] = state_dict["tok_embeddings.weight"]
        return state_dict

    def our_names(self, hf_name: str) -> tuple[str, ...]:
        """Our parameters that one of Hugging Face's is made of."""
        name = self._our_name(hf_name)
        _, _, parts = self._fusion_of(name)
        return parts or (name,)

    def is_unread(self, hf_name: str) -> bool:
        """Whether an earlier version of the model's library wrote this tensor, which no code reads."""
        found = re.match(re.escape(self._layers_prefix) + r"(\d+)\.", hf_name)
        if found is None or int(found[1]) >= self.model_args.n_layers:
            return False
        names = self._names(int(found[1]))
        mixer = dict(names.prefixes)["mixer."]
        return hf_name.removeprefix(found[0]) in [mixer + name for name in names.unread]

    def hf_name(self, name: str) -> str:
        """Hugging Face's name of one of our parameters."""
        found = re.match(r"layers\.(\d+)\.", name)
        if found is None:
            return _rename(name, self._outside())
        within = _rename(name.removeprefix(found[0]), self._names(int(found[1])).table())
        return f"{self._layers_prefix}{found[1]}.{within}"

    def _our_name(self, hf_name: str) -> str:
        found = re.match(re.escape(self._layers_prefix) + r"(\d+)\.", hf_name)
        if found is None:
            return _rename(hf_name, [(theirs, ours) for ours, theirs in self._outside()])
        layer = int(found[1])
        if layer >= self.model_args.n_layers:
            raise ValueError(f"{hf_name} is not a parameter of this model")
        table = [(theirs, ours) for ours, theirs in self._names(layer).table()]
        return f"layers.{layer}.{_rename(hf_name.removeprefix(found[0]), table)}"

    def _fusion_of(self, name: str) -> tuple[Fusion | None, str, tuple[str, ...]]:
        """For a fused parameter, under our prefix, or one of its parts: how they are fused, its name, and those of all its parts."""
        found = re.fullmatch(r"(layers\.(\d+)\.mixer\.)(.+)(\.\w+)", name)
        for fusion in self._names(int(found[2])).fused if found else ():
            if found[3] in (fusion.whole, *fusion.parts):
                return fusion, found[1] + fusion.whole + found[4], tuple(found[1] + part + found[4] for part in fusion.parts)
        return None, name, ()

    def _names(self, layer: int) -> LayerNames:
        hf_format = self.model_args.hf_format
        return hf_format.layers if self.model_args.attention_of(layer) is None else hf_format.attention_layers

    def _outside(self) -> tuple[tuple[str, str], ...]:
        prefix = self.model_args.hf_prefix
        pairs = self.model_args.hf_format.outside
        return tuple((ours, re.sub(r"^model\.", prefix, theirs)) for ours, theirs in pairs)

    @property
    def _layers_prefix(self) -> str:
        return f"{self.model_args.hf_prefix}layers."


def _rename(name: str, table: list[tuple[str, str]] | tuple[tuple[str, str], ...]) -> str:
    for old, new in table:
        if name.startswith(old):
            return new + name[len(old) :]
    raise ValueError(f"{name} is not a parameter of this model")
