"""What makes a model family of the zoo."""

from dataclasses import dataclass

from refine_titan.models.decoder import DecoderArgs
from refine_titan.models.shared_prefix import SharedPrefixMixer


@dataclass(frozen=True)
class Family:
    """A model family: its args and its mixer, which do not know each other, and its presets.

    Attributes:
        args_class: sizes and options; its `hf_format` describes the family's Hugging Face checkpoints.
        mixer_class: builds one layer's sequence mixer from such args.
        flavors: presets by name, `debug` among them.
    """

    args_class: type[DecoderArgs]
    mixer_class: type[SharedPrefixMixer]
    flavors: dict[str, DecoderArgs]
