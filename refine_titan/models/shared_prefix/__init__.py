"""The tree of a forward pass: one packed trunk, branches that leave it, and the states at chosen positions.

A forward runs over the flat stream `[trunk | branch 1 | ... | branch n]`. Everything but the sequence mixers sees plain tokens; a mixer
sees the tree through `SharedPrefixLayout`. A *position* r names the place between tokens r - 1 and r of the trunk: a branch that starts at
r continues the document of token r - 1, and the state at r has read that document up to token r - 1. The *rows* of a tensor `[T, ...]`
are its parts along the first dim, one for each token.
"""

from refine_titan.models.shared_prefix.layer_state import Entries, LayerState, StateShape, StateTensors
from refine_titan.models.shared_prefix.layout import SharedPrefixLayout, split_arrival
from refine_titan.models.shared_prefix.mixer import SharedPrefixMixer
from refine_titan.models.shared_prefix.snapshots import SnapshotBank, read_with_snapshots

__all__ = [
    "Entries",
    "LayerState",
    "SharedPrefixLayout",
    "SharedPrefixMixer",
    "SnapshotBank",
    "StateShape",
    "StateTensors",
    "read_with_snapshots",
    "split_arrival",
]
