"""What makes a model family of the zoo."""

from dataclasses import dataclass

from refine_titan.models.attention.mixer import AttentionMixer
from refine_titan.models.decoder import DecoderArgs
from refine_titan.models.shared_prefix import SharedPrefixMixer


@dataclass(frozen=True)
class Family:
    """A model family: its args and its mixer, which do not know each other, and its presets.

    Attributes:
        args_class: sizes and options; its `hf_format` describes the family's Hugging Face checkpoints.
        mixer_class: builds the sequence mixer of a layer without attention from such args.
        flavors: presets by name, `debug` among them.
    """

    args_class: type[DecoderArgs]
    mixer_class: type[SharedPrefixMixer]
    flavors: dict[str, DecoderArgs]

    def build_mixer(self, args: DecoderArgs, layer: int) -> SharedPrefixMixer:
        """The sequence mixer of a layer: attention where the args say so, the family's own elsewhere."""
        attention = args.attention_of(layer)
        return self.mixer_class(args) if attention is None else AttentionMixer(attention)
