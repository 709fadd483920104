"""How a family's checkpoints look at Hugging Face: the keys of `config.json`, both ways, and the names of parameters."""

import re
import typing
from dataclasses import dataclass, field
from typing import Any

import torch

from refine_titan.config.type_checks import describe, matches

# Our fields and Hugging Face's keys that every family has.
DECODER_KEYS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "hidden_ratio": "hidden_ratio",
    "intermediate_size": "intermediate_size",
    "norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
}

# Keys of which only these values are implemented; the first one is written.
DECODER_FIXED: dict[str, tuple[Any, ...]] = {"hidden_act": ("swish", "silu")}

# Keys of which only these values are implemented, where they appear at all.
DECODER_TOLERATED: dict[str, tuple[Any, ...]] = {"rope_scaling": (None,), "add_cross_attention": (False,)}

# Keys of flash-linear-attention's models of which only these values are implemented, where they appear at all.
FLA_FIXED: dict[str, tuple[Any, ...]] = {
    "attnres_block_size": (None,),
    "norm_first": (False,),
    "share_conv_kernel": (False,),
    "use_rope": (False,),
    "use_output_norm": (True,),
    "conv_bias": (False,),
    "elementwise_affine": (True, None),
}

# Keys that do not change what a model computes: names, tokens, kernels, memory, generation.
IRRELEVANT = frozenset(
    "_attn_implementation_autoset _name_or_path architectures attn_mode auto_map bos_token_id chunk_size "
    "chunk_size_feed_forward dtype eos_token_id finetuning_task fuse_cross_entropy fuse_linear_cross_entropy fuse_norm "
    "fuse_swiglu id2label is_decoder is_encoder_decoder keys_to_ignore_at_inference label2id last_layer_fuse_norm "
    "max_position_embeddings model_type output_attentions output_hidden_states pad_token_id problem_type "
    "return_dict sep_token_id task_specific_params tokenizer_class torch_dtype torchscript transformers_version "
    "use_bfloat16 use_cache use_l2warp".split()
)


# Ours and Hugging Face's beginnings of the names of parameters, outside the layers.
OUTSIDE = (("tok_embeddings.", "model.embeddings."), ("norm.", "model.norm."), ("output.", "lm_head."))


@dataclass(frozen=True)
class Fusion:
    """A module of theirs whose rows are those of several of ours.

    Attributes:
        whole: its name, within a layer's mixer.
        parts: names of ours.
        sizes: names of the args that tell the rows of each part; none if all are equally many.
        groups: name of the args' number of groups, in each of which rows of all parts follow each other; empty for one group.
    """

    whole: str
    parts: tuple[str, ...]
    sizes: tuple[str, ...] = ()
    groups: str = ""

    def join(self, parts: list[torch.Tensor], args: Any) -> torch.Tensor:
        groups = getattr(args, self.groups) if self.groups else 1
        return torch.cat([x.unflatten(0, (groups, -1)) for x in parts], 1).flatten(0, 1)

    def split(self, whole: torch.Tensor, args: Any) -> list[torch.Tensor]:
        groups = getattr(args, self.groups) if self.groups else 1
        grouped = whole.unflatten(0, (groups, -1))
        if not self.sizes:
            return [x.flatten(0, 1) for x in grouped.chunk(len(self.parts), 1)]
        return [x.flatten(0, 1) for x in grouped.split([getattr(args, size) // groups for size in self.sizes], 1)]


@dataclass(frozen=True)
class LayerNames:
    """Names of the parameters of a layer.

    Attributes:
        prefixes: ours and their beginnings, within a layer.
        renames: the mixer's parameters that have another name there, as exact names within a layer's mixer: ours, then theirs.
        fused: their modules that are several of ours.
        unread: the mixer's tensors that earlier versions of the library wrote and no version reads.
    """

    prefixes: tuple[tuple[str, str], ...] = (
        ("mixer_norm.", "attn_norm."),
        ("mixer.", "attn."),
        ("mlp_norm.", "mlp_norm."),
        ("mlp.", "mlp."),
    )
    renames: tuple[tuple[str, str], ...] = ()
    fused: tuple[Fusion, ...] = ()
    unread: tuple[str, ...] = ()

    def table(self) -> list[tuple[str, str]]:
        """Ours and theirs, within a layer, exact names before beginnings."""
        prefix = dict(self.prefixes)["mixer."]
        return [*((f"mixer.{ours}", f"{prefix}{theirs}") for ours, theirs in self.renames), *self.prefixes]


@dataclass(frozen=True)
class HFFormat:
    """A family's Hugging Face checkpoints.

    Attributes:
        model_type: value of `model_type`.
        architecture: class that loads the checkpoint.
        keys: our field to their key, the mixer's part, and of what every decoder has that which is called otherwise there; an empty key
            for what they do not have.
        fixed: keys of which only some values are implemented, the first of them written.
        tolerated: the same, but not written: keys of other versions of the library.
        irrelevant: further keys that do not change what the model computes.
        earlier_keys: keys of earlier versions of the library, and what these are called now.
        outside: ours and their beginnings of the names of parameters outside the layers.
        layers: names in layers with the family's own mixer.
        attention_layers: names in layers with attention.
        other_model_types: further values of `model_type` that the args understand.
        carried: beginnings of the names of tensors beside the model, such as a vision tower, that conversion carries along and training
            leaves alone.
        keep_in_float32: ends of the names of parameters that an export in a lower precision keeps in float32.
        library: what has the class `architecture`.
    """

    model_type: str
    architecture: str
    keys: dict[str, str]
    fixed: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    tolerated: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    irrelevant: frozenset[str] = frozenset()
    earlier_keys: dict[str, str] = field(default_factory=dict)
    outside: tuple[tuple[str, str], ...] = OUTSIDE
    layers: LayerNames = LayerNames()
    attention_layers: LayerNames = LayerNames()
    other_model_types: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    keep_in_float32: tuple[str, ...] = ()
    library: typing.Literal["flash-linear-attention", "transformers", "LaCT"] = "flash-linear-attention"

    @property
    def all_keys(self) -> dict[str, str]:
        """Our field to their key, the decoder's and the mixer's."""
        return {name: key for name, key in (DECODER_KEYS | self.keys).items() if key}

    def read(self, config: dict[str, Any], hints: dict[str, Any]) -> dict[str, Any]:
        """Reads our fields from a `config.json`. Keys that it lacks are left to the defaults, which are the library's.

        Raises:
            ValueError: naming the first key that is missing, unknown, of the wrong type, or of a value not implemented.
        """
        if config.get("model_type") != self.model_type:
            raise ValueError(f"config.json: model_type is {config.get('model_type')!r}, expected {self.model_type!r}")
        config = self.with_todays_keys(config)
        keys = self.all_keys
        missing = [key for key in ("hidden_size", "num_hidden_layers") if key not in config]
        if missing:
            raise ValueError(f"config.json: missing {', '.join(missing)}")
        allowed = DECODER_FIXED | DECODER_TOLERATED | self.tolerated | self.fixed
        known = {*keys.values(), *allowed, *IRRELEVANT, *self.irrelevant}
        for key, value in config.items():
            if key in allowed and value not in allowed[key]:
                values = ", ".join(repr(option) for option in allowed[key])
                raise ValueError(f"config.json: {key} is {value!r}; allowed: {values}")
            if key not in known:
                raise ValueError(
                    f"config.json: {key} = {value!r} is not a setting of {self.model_type} known here; remove it if it does "
                    "not change the model"
                )
        fields = {name: config[key] for name, key in keys.items() if key in config}
        for name, value in fields.items():
            if not matches(value, hints[name]):
                raise ValueError(f"config.json: {keys[name]} is {value!r}; allowed: {describe(hints[name])}")
        return fields

    def with_todays_keys(self, config: dict[str, Any]) -> dict[str, Any]:
        """The same `config.json` with the names of today for the keys of earlier versions of the library.

        Raises:
            ValueError: if a key has another value under its earlier name.
        """
        for earlier, key in self.earlier_keys.items():
            if earlier in config:
                if config.get(key, config[earlier]) != config[earlier]:
                    raise ValueError(f"config.json: {earlier} is {config[earlier]!r} and {key}, its name of today, {config[key]!r}")
                config = {name: value for name, value in config.items() if name != earlier} | {key: config[earlier]}
        return config

    def write(self, args: Any) -> dict[str, Any]:
        """Makes the `config.json` of a model."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **{key: values[0] for key, values in (DECODER_FIXED | self.fixed).items()},
            **{key: getattr(args, name) for name, key in self.all_keys.items()},
        }


class HFConfigurable:
    """A base of args that are read from, and written as, a Hugging Face `config.json`."""

    hf_format: typing.ClassVar[HFFormat]

    is_part_of_larger: typing.ClassVar[bool] = False
    """Whether checkpoints are those of a larger model of which this one is a part, such as the text model beside a vision tower."""

    @property
    def hf_prefix(self) -> str:
        """What the names of a checkpoint's parameters begin with, but the head's."""
        return "model."

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]):
        """Reads a Hugging Face `config.json`.

        Raises:
            ValueError: if it describes another model, or asks for something that this family does not have.
        """
        fields = cls.hf_format.read(config, typing.get_type_hints(cls))
        try:
            return cls(**fields)
        except ValueError as error:
            keys = cls.hf_format.all_keys
            names = re.compile(rf"\b({'|'.join(sorted(keys, key=len, reverse=True))})\b")
            message = names.sub(lambda found: keys[found.group()], str(error))
            raise ValueError(f"config.json: {message}") from error

    @classmethod
    def with_overrides(cls, config: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        """A `config.json` in which fields have other values, as far as it speaks of them."""
        keys = cls.hf_format.all_keys
        return config | {keys[name]: value for name, value in values.items() if name in keys}

    def to_hf_config(self) -> dict[str, Any]:
        """Makes the `config.json` with which the family's own library loads an exported checkpoint."""
        return self.hf_format.write(self)
