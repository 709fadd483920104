"""The layout of a flat stream: where the trunk's documents, the branches and the wanted states lie."""

from dataclasses import dataclass

import torch

from refine_kernels.packing import check_packing
from refine_kernels.past_tokens import host_tensor, position_array
from refine_titan.models.context_shard import ContextShard
from refine_titan.models.decoding import DecodingClock


@dataclass(frozen=True)
class SharedPrefixLayout:
    """Documents, branches and wanted states of one forward, as integers on the host that all layers share.

    Attributes:
        cu_seqlens: positions at which the trunk's documents begin and end, from 0 to T.
        branch_starts: position of each branch, in 1..T; several may be equal.
        branch_length: tokens of each branch, k.
        state_positions: positions whose states the forward returns; a range where they are many, None for no states.
        shard: given where several ranks share the trunk and this forward reads one rank's part. `cu_seqlens` is then the shard's own
            packing, all positions count from its first token, and position 0 may be wanted: the state that arrives from earlier ranks.
        decoding: given where the trunk is the next token of every sequence, without gradient. The state that a call returns is good
            for the next such call only; the first call takes a state of any other call, or of `begin_decoding`.

    Raises:
        ValueError: if the documents do not cover the trunk, a position lies outside it, or branches lack a length or a length branches.
    """

    cu_seqlens: tuple[int, ...]
    branch_starts: tuple[int, ...] = ()
    branch_length: int = 0
    state_positions: tuple[int, ...] | range | None = None
    shard: ContextShard | None = None
    decoding: DecodingClock | None = None

    @classmethod
    def decoding_step(cls, num_sequences: int, clock: DecodingClock) -> "SharedPrefixLayout":
        """The layout of the next token of every sequence; whoever makes the call lets the clock `advance` after it."""
        return cls(tuple(range(num_sequences + 1)), state_positions=range(1, num_sequences + 1), decoding=clock)

    def __post_init__(self):
        inside = self.state_positions or ()
        if self.shard is not None and self.shard.seen > 0:
            inside, _ = split_arrival(inside)
        for positions in (self.branch_starts, inside):
            check_packing(self.cu_seqlens, self.cu_seqlens[-1], positions)
        if bool(self.branch_starts) != (self.branch_length > 0):
            raise ValueError(
                f"branches need a length and a length needs branches: got {len(self.branch_starts)} branches of {self.branch_length} tokens"
            )

    @property
    def num_trunk_tokens(self) -> int:
        return self.cu_seqlens[-1]

    @property
    def num_branches(self) -> int:
        return len(self.branch_starts)

    @property
    def num_tokens(self) -> int:
        """Length of the flat stream."""
        return self.num_trunk_tokens + self.num_branches * self.branch_length

    @property
    def branch_cu_seqlens(self) -> tuple[int, ...]:
        """The branches as a packing of their own."""
        return tuple(range(0, (self.num_branches + 1) * self.branch_length, self.branch_length))

    def branch_rows(self) -> torch.Tensor:
        """Indices of the branches' tokens in the flat stream, `[n, k]`."""
        rows = torch.arange(self.num_branches * self.branch_length) + self.num_trunk_tokens
        return rows.view(self.num_branches, self.branch_length)

    def predicting_rows(self) -> torch.Tensor:
        """Indices of the tokens that predict the branches' tokens, `[n, k]`: the trunk's token before the branch, then the branch's own
        but the last."""
        before = torch.tensor(self.branch_starts, dtype=torch.long) - 1
        return torch.cat([before[:, None], self.branch_rows()[:, :-1]], dim=1)


def split_arrival(positions: tuple[int, ...] | range) -> tuple[tuple[int, ...] | range, torch.Tensor]:
    """The positions above 0, and the index of every given position in `[0, *those]`."""
    if isinstance(positions, range):
        inside = positions[1:] if positions and positions[0] == 0 else positions
    else:
        inside = tuple(r for r in positions if r > 0)
    above = position_array(positions) > 0
    return inside, host_tensor(above.cumsum() * above)
