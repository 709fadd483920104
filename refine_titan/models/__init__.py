"""The model zoo: a decoder that all families share, and a folder per family."""

from refine_titan.models.decoder import DecoderArgs, FastWeightDecoder
from refine_titan.models.delta_net import DELTA_NET
from refine_titan.models.family import Family
from refine_titan.models.gated_delta_net import GATED_DELTA_NET
from refine_titan.models.gated_delta_product import GATED_DELTA_PRODUCT
from refine_titan.models.kda import KDA
from refine_titan.models.lact import LACT
from refine_titan.models.olmo_hybrid import OLMO_HYBRID
from refine_titan.models.qwen3_5 import QWEN3_5

FAMILIES: dict[str, Family] = {
    "delta_net": DELTA_NET,
    "gated_delta_net": GATED_DELTA_NET,
    "lact": LACT,
    "kda": KDA,
    "gated_delta_product": GATED_DELTA_PRODUCT,
    "qwen3_5": QWEN3_5,
    "olmo_hybrid": OLMO_HYBRID,
}
"""The families by the name that `[model] name` gives them."""

LACKING = {
    "qwen3_next": "a mixture of experts",
    "qwen3_5_moe": "a mixture of experts",
    "qwen3_5_moe_text": "a mixture of experts",
    "kimi_linear": "a mixture of experts and latent attention",
}
"""What models lack here that are hybrids of fast weights and attention too, by `model_type`."""


def family_of(args: DecoderArgs) -> Family:
    """The family whose sizes and options these are."""
    return next(family for family in FAMILIES.values() if type(args) is family.args_class)


def family_of_model_type(model_type: object) -> str:
    """The name of the family whose Hugging Face `model_type` this is.

    Raises:
        ValueError: if there is none, or it is no text.
    """
    formats = {name: family.args_class.hf_format for name, family in FAMILIES.items()}
    names = {known: name for name, f in formats.items() for known in (f.model_type, *f.other_model_types)}
    if isinstance(model_type, str) and model_type in LACKING:
        raise ValueError(f"config.json: model_type is {model_type!r}, which needs {LACKING[model_type]}: not implemented")
    if not isinstance(model_type, str) or model_type not in names:
        raise ValueError(f"config.json: model_type is {model_type!r}; known: {', '.join(names)}")
    return names[model_type]


def build_decoder(args: DecoderArgs) -> FastWeightDecoder:
    """The model that the args describe, with uninitialised weights, on torch's current default device."""
    return FastWeightDecoder(args, family_of(args).build_mixer)
