"""A rank's part of a trunk that several ranks share (context parallelism), and what the ranks pass each other.

The trunk is cut into equal, contiguous shards, in the order of the ranks. A mixer that finds the shard in its layout goes on with the
document that the previous rank has begun, and hands on the one that it does not finish. Every exchange is differentiable, and its
backward exchanges too: a mixer must let each of them reach its outputs on every rank (`tied`).

Legend: T tokens of all ranks, H heads, K key and V value channels of a head.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakSet

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class ContextShard:
    """The tokens of a packed trunk that one rank holds.

    Attributes:
        cu_seqlens: positions at which the whole trunk's documents begin and end.
        begin: position in the whole trunk at which this rank's tokens begin.
        end: position at which they end.
        group: the ranks that share the trunk; None where one rank holds all of it.
    """

    cu_seqlens: tuple[int, ...]
    begin: int
    end: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def of_rank(cls, cu_seqlens: Sequence[int], group: dist.ProcessGroup | None) -> "ContextShard":
        """This rank's shard of a trunk whose number of tokens is a multiple of the group's size."""
        rank, size = (0, 1) if group is None else (group.rank(), group.size())
        num_tokens, rest = divmod(cu_seqlens[-1], size)
        assert rest == 0, f"{cu_seqlens[-1]} tokens for {size} ranks"
        return cls(tuple(cu_seqlens), rank * num_tokens, (rank + 1) * num_tokens, group)

    @property
    def tokens(self) -> slice:
        """This rank's tokens in the whole trunk."""
        return slice(self.begin, self.end)

    @property
    def num_tokens(self) -> int:
        return self.end - self.begin

    @property
    def local_cu_seqlens(self) -> tuple[int, ...]:
        """The shard's own packing: the documents cut at its borders, counted from its first token."""
        inside = (r - self.begin for r in self.cu_seqlens if self.begin < r < self.end)
        return (0, *inside, self.num_tokens)

    @property
    def seen(self) -> int:
        """How many tokens of the shard's first document earlier ranks hold."""
        return self.begin - self.cu_seqlens[bisect.bisect_right(self.cu_seqlens, self.begin) - 1]

    @property
    def continues(self) -> bool:
        """Whether the shard's last document goes on at the next rank."""
        return self.end not in self.cu_seqlens

    def local(self, positions: tuple[int, ...] | range) -> tuple[int, ...] | range:
        """Positions of the whole trunk, counted from the shard's first token instead."""
        if isinstance(positions, range):
            return range(positions.start - self.begin, positions.stop - self.begin)
        return tuple(r - self.begin for r in positions)

    def owns(self, start: int) -> bool:
        """Whether a branch at position `start` of the whole trunk continues a token of this shard."""
        return self.begin < start <= self.end


def tied(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """`x` unchanged, with the others in its graph: whenever the backward of `x` runs, that of the others does, with zeros."""
    return _Tied.apply(x, *others)


def compose_states(transition_HKK: torch.Tensor, state_HKV: torch.Tensor, shard: ContextShard) -> torch.Tensor:
    """The state that this rank's first document has on arrival, `[H, K, V]`.

    A rank's tokens turn a state S into `transition S + state`. A call makes one all-gather, and its backward another; what they
    gather is not kept.

    Args:
        transition_HKK: factor of the arriving state; zeros where the rank's last document is its own.
        state_HKV: what the rank's tokens make of an empty state.
    """
    return _ComposedStates.apply(transition_HKK, state_HKV, shard.group)


def rows_before(tail: torch.Tensor, shard: ContextShard) -> torch.Tensor:
    """The previous rank's `tail` if its last document goes on here, else zeros. The tails of all ranks have the same shape."""
    return _RowsBefore.apply(tail, shard)


def rows_after(head: torch.Tensor, shard: ContextShard) -> torch.Tensor:
    """The next rank's `head`, whatever its documents are; zeros on the last rank. Not differentiable."""
    rank, size = shard.group.rank(), shard.group.size()
    return _shift(head.detach(), shard.group, rank - 1 if rank > 0 else None, rank + 1 if rank + 1 < size else None)


def gather_rows(x_T: torch.Tensor, shard: ContextShard) -> torch.Tensor:
    """The rows of all ranks, `[T, ...]`. Not differentiable."""
    if shard.group is None:
        return x_T
    return _all_gather(x_T.detach(), shard.group).flatten(0, 1)


def shared_rows(x_T: torch.Tensor, shard: ContextShard) -> torch.Tensor:
    """Gathers all ranks' tokens, for a computation of which every rank does a part: the gradients of the parts are summed."""
    return _SharedRows.apply(x_T, shard.group)


def send_state(state: torch.Tensor, shard: ContextShard) -> torch.Tensor:
    """Hands a flat state to the next rank and returns a zero, which has to be tied to an output."""
    return _Send.apply(state, shard.group)


def receive_state(like: torch.Tensor, shard: ContextShard) -> torch.Tensor:
    """The state that the previous rank sends, which has to be tied to an output. `like` has its shape, and puts it into the graph."""
    return _Receive.apply(like, shard.group)


class _ComposedStates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, transition, state, group):
        everyones = _all_gather(torch.cat([transition, state], -1), group)
        arriving = torch.zeros_like(state)
        K = transition.shape[-1]
        for rank in range(group.rank()):
            arriving = everyones[rank, ..., :K] @ arriving + everyones[rank, ..., K:]
        ctx.group = group
        ctx.save_for_backward(transition, arriving)
        return arriving

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_arriving):
        transition, arriving = ctx.saved_tensors
        everyones = _all_gather(torch.cat([transition, grad_arriving], -1), ctx.group)
        K = transition.shape[-1]
        grad_leaving = torch.zeros_like(grad_arriving)
        for rank in range(ctx.group.size() - 1, ctx.group.rank(), -1):
            grad_leaving = everyones[rank, ..., :K].mT @ grad_leaving + everyones[rank, ..., K:]
        return grad_leaving @ arriving.mT, grad_leaving, None


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *others):
        ctx.others = [(other.shape, other.dtype) for other in others]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, *(grad.new_zeros((), dtype=dtype).expand(shape) for shape, dtype in ctx.others)


class _RowsBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tail, shard):
        rank = shard.group.rank()
        ctx.group = shard.group
        ctx.following = rank + 1 if shard.continues else None
        ctx.previous = rank - 1 if shard.seen else None
        return _shift(tail, ctx.group, ctx.following, ctx.previous)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return _shift(grad, ctx.group, ctx.previous, ctx.following), None


class _SharedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _all_gather(x, group).flatten(0, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        own = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_single(own, grad.contiguous(), group=ctx.group)
        return own, None


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx, state, group):
        ctx.group = group
        ctx.like = state.shape, state.dtype, state.device
        dist.send(state.contiguous(), group=group, group_dst=group.rank() + 1)
        return state.new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _):
        shape, dtype, device = ctx.like
        grad = torch.empty(shape, dtype=dtype, device=device)
        dist.recv(grad, group=ctx.group, group_src=ctx.group.rank() + 1)
        return grad, None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, like, group):
        ctx.group = group
        state = torch.empty_like(like)
        dist.recv(state, group=group, group_src=group.rank() - 1)
        return state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dist.send(grad.contiguous(), group=ctx.group, group_dst=ctx.group.rank() - 1)
        return torch.zeros_like(grad), None


# Groups all of whose ranks have been in an operation together.
_joined: WeakSet[dist.ProcessGroup] = WeakSet()


def _join(group: dist.ProcessGroup, device: torch.device) -> None:
    """Has all ranks of the group in one operation, the first time. NCCL connects a group's ranks in its first operation, and what it does
    is undefined if that is an exchange that some of them take no part in (torch 2.13.0, `batch_isend_irecv`)."""
    if group not in _joined:
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        _joined.add(group)


def _shift(x: torch.Tensor, group: dist.ProcessGroup, to: int | None, source: int | None) -> torch.Tensor:
    """Sends `x` to one rank of the group and returns what another one sends; None for neither, zeros if nothing comes. All ranks of the
    group must call this."""
    received = torch.zeros_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return received
    _join(group, x.device)
    exchanges = []
    if to is not None:
        exchanges.append(dist.P2POp(dist.isend, x.contiguous(), group=group, group_peer=to))
    if source is not None:
        exchanges.append(dist.P2POp(dist.irecv, received, group=group, group_peer=source))
    if exchanges:
        for exchange in dist.batch_isend_irecv(exchanges):
            exchange.wait()
    return received


def _all_gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The tensors of all ranks, `[ranks, *x.shape]`."""
    gathered = x.new_empty(group.size(), *x.shape)
    dist.all_gather(list(gathered.unbind(0)), x.contiguous(), group=group)
    return gathered
