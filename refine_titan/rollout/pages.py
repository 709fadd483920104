"""The layout of a sequence's state in the memory pages of an engine."""

import math
from dataclasses import dataclass

import torch

from refine_titan.models import family_of
from refine_titan.models.decoder import DecoderArgs
from refine_titan.models.shared_prefix import SharedPrefixMixer, StateShape

ALIGNMENT = 64


@dataclass(frozen=True)
class PageLayout:
    """One layer's state of one sequence in one page of bytes.

    Attributes:
        shapes: the state's tensors, widest elements first, so that each lies aligned.
    """

    shapes: dict[str, StateShape]

    @classmethod
    def of(cls, args: DecoderArgs, compute_dtype: torch.dtype) -> "PageLayout":
        """Returns the layout for a layer with the family's own mixer, of a model that computes in `compute_dtype`."""
        with torch.device("meta"):
            return cls.of_mixer(family_of(args).mixer_class(args), compute_dtype)

    @classmethod
    def of_mixer(cls, mixer: SharedPrefixMixer, compute_dtype: torch.dtype) -> "PageLayout":
        """Returns the layout for one mixer, which holds a part of its heads under tensor parallelism."""
        shapes = mixer.state_shapes(compute_dtype)
        return cls(dict(sorted(shapes.items(), key=lambda item: -item[1].dtype.itemsize)))

    @property
    def num_bytes(self) -> int:
        """Bytes of a page, padded so that the next page begins aligned."""
        return self.num_bytes_of_part(1)

    def num_bytes_of_part(self, degree: int) -> int:
        """Returns the bytes of a page if `degree` ranks share the heads."""
        return -(-sum(_num_bytes(state) for state in self.shapes.values()) // (ALIGNMENT * degree)) * ALIGNMENT

    def views(self, pages: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the state's tensors `[pages, ...]` as views of int8 memory `[pages, num_bytes]`."""
        views, offset = {}, 0
        for name, state in self.shapes.items():
            part = pages[:, offset : offset + _num_bytes(state)]
            views[name] = part.view(state.dtype).unflatten(1, state.shape)
            offset += _num_bytes(state)
        return views


def _num_bytes(state: StateShape) -> int:
    return math.prod(state.shape) * state.dtype.itemsize
