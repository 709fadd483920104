"""The model zoo: one folder per family, each with `ARGS`, `FLAVORS` and `STATE_DICT_ADAPTER`."""

from refine_titan.models import delta_net, gated_delta_net, gated_delta_product, kda, lact

FAMILIES = {
    "delta_net": delta_net,
    "gated_delta_net": gated_delta_net,
    "lact": lact,
    "kda": kda,
    "gated_delta_product": gated_delta_product,
}


def family_of_model_type(model_type: str) -> str:
    """Our name of the family whose Hugging Face `model_type` this is.

    Raises:
        ValueError: if there is none.
    """
    names = {family.ARGS.hf_format.model_type: name for name, family in FAMILIES.items()}
    if model_type not in names:
        raise ValueError(f"config.json: model_type is {model_type!r}; known: {', '.join(names)}")
    return names[model_type]
