"""Keeps an engine's weights equal to the trainer's: shared where both can use one storage, else gathered and copied one by one.

An engine whose `version` is not the trainer's must not sample: a stale or incomplete sync is an error, and never just a worse reward.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor, distribute_tensor

from refine_kernels.packing import on_device, on_host
from refine_titan.models.sharded_tensors import local
from refine_titan.rollout.engine import EngineError

# Integers of the width of a parameter's elements.
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class WeightSync:
    """Binds a model without weights of its own to a trainer's model of the same parameters, and keeps the two equal.

    Attributes:
        version: optimizer steps of the weights that the engine holds; None before the first sync, during a sync, and after one that
            failed.
        checksum: checksum of all bits of the engine's weights; equal weights have equal checksums on every rank.
        bytes_copied: bytes that every sync copies; 0 if all storage is shared.
    """

    def __init__(
        self,
        trainer: nn.Module,
        engine: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        replicas: dist.ProcessGroup | None = None,
    ):
        """Gives each parameter of `engine` the trainer's storage, or memory on `device` to copy to.

        Args:
            trainer: its parameters may be sharded (FSDP2, tensor parallelism).
            engine: on the meta device; equal names and shapes; sharded like the trainer over tensor-parallel ranks.
            dtype: of the engine's parameters, but those of modules that keep float32.
            replicas: ranks whose engines hold the same as this one; None for no others.

        Raises:
            EngineError: naming the first parameter that only one of the two has, or whose shapes differ.
        """
        self._trainer, self._replicas = trainer, replicas
        device = torch.empty(0, device=device).device  # "cpu:0" is the "cpu" of its tensors
        self.bytes_copied = 0
        self.invalidate("they were never synchronised")
        self._shared: dict[str, nn.Parameter] = {}
        self._copied: dict[str, nn.Parameter] = {}
        sources = self._sources()
        bound: dict[int, nn.Parameter] = {}  # tied parameters stay one
        wide = {id(part) for module in engine.modules() if getattr(module, "keeps_float32", False) for part in module.modules()}
        for module_name, module in engine.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                full_name = f"{module_name}.{name}".lstrip(".")
                source = sources.get(full_name)
                if source is None or source.shape != parameter.shape:
                    found = "missing" if source is None else f"of shape {tuple(source.shape)}"
                    raise EngineError(f"{full_name} is {found} in the trainer; the engine needs shape {tuple(parameter.shape)}")
                if id(parameter) not in bound:
                    wanted = torch.promote_types(dtype, torch.float32) if id(module) in wide else dtype
                    bound[id(parameter)] = self._bind(full_name, source, parameter, wanted, device)
                setattr(module, name, bound[id(parameter)])
        surplus = sources.keys() - dict(engine.named_parameters(remove_duplicate=False)).keys()
        if surplus:
            raise EngineError(f"{min(surplus)} is a parameter of the trainer only")

    def _bind(self, name: str, source: torch.Tensor, target: nn.Parameter, dtype, device) -> nn.Parameter:
        if _placement(source) == _placement(target) and source.dtype == dtype and source.device == device:
            parameter = nn.Parameter(source, requires_grad=False)
            self._shared[name] = parameter
            return parameter
        memory = torch.empty(local(target).shape, dtype=dtype, device=device)
        if isinstance(target, DTensor):
            memory = DTensor.from_local(
                memory, target.device_mesh, target.placements, shape=target.shape, stride=target.stride(), run_check=False
            )
        parameter = nn.Parameter(memory, requires_grad=False)
        self._copied[name] = parameter
        self.bytes_copied += local(parameter).nbytes
        return parameter

    @property
    def shares_storage(self) -> bool:
        """Whether all weights are the trainer's own, so that a sync copies nothing."""
        return not self._copied

    @torch.no_grad()
    def sync(self, version: int) -> None:
        """Makes the engine's weights those of the trainer after `version` optimizer steps. With a sharded trainer every rank
        must call this.

        Raises:
            EngineError: if a weight is missing, has another shape or is not finite, or if what the engine holds afterwards is not
                what the trainer sent, or not the same on every rank.
        """
        self.invalidate("their last sync was not completed")
        sent: list[_WordSum] = []
        for name, tensor in self._stream():
            target = self._copied.get(name)
            if target is None:
                target = local(self._shared[name])
                if target.data_ptr() != tensor.data_ptr():
                    raise EngineError(f"{name} no longer shares the trainer's storage")
            else:
                sent.append(_word_sum(name, tensor))
                local(target).copy_(tensor)
        copied = [_word_sum(name, parameter) for name, parameter in self._copied.items()]
        shared = [_word_sum(name, parameter) for name, parameter in self._shared.items()]
        (sent_checksum, copied_checksum, held), is_broken = _read([sent, copied, [*copied, *shared]], self._not_finite())
        if copied_checksum != sent_checksum:
            raise EngineError(
                f"checksum of the engine's weights is {copied_checksum:016x} after the sync, the trainer sent {sent_checksum:016x}"
            )
        if any(is_broken):
            name = list(self._shared | self._copied)[is_broken.index(1)]
            raise EngineError(f"{name} has values that are not finite (weights version {version})")
        self._compare_ranks(held)
        self.checksum, self.version = held, version

    def invalidate(self, reason: str) -> None:
        """Says that the engine cannot sample until the next sync, and why."""
        self.version: int | None = None
        self.checksum: int | None = None
        self._reason = reason

    def require(self, version: int | None = None) -> None:
        """Raises EngineError unless the engine holds complete weights, of this version if one is given."""
        if self.version is None:
            raise EngineError(f"the engine's weights cannot be used: {self._reason}")
        if version is not None and self.version != version:
            raise EngineError(f"the engine holds weights version {self.version}, wanted is version {version}: stale rollouts are refused")

    def _sources(self) -> dict[str, torch.Tensor]:
        # state_dict and not parameters: it makes FSDP2 put its shards back, and names wrapped modules as if they were not.
        return self._trainer.state_dict()

    def _stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The trainer's weights one by one in the engine's dtype, as much of each as this rank's engine holds."""
        sources = self._sources()
        for name, target in (self._shared | self._copied).items():
            if name not in sources:
                raise EngineError(f"{name} is missing in the trainer")
            source = sources[name]
            if source.shape != target.shape:
                raise EngineError(f"{name} has shape {tuple(source.shape)} in the trainer, {tuple(target.shape)} in the engine")
            tensor = source.to(target.dtype)  # before gathering: half the bytes for a bfloat16 engine
            if _placement(tensor) != _placement(target):
                tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if isinstance(target, DTensor):
                    tensor = distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)
            yield name, local(tensor).to(target.device)

    def _not_finite(self) -> torch.Tensor:
        """For each parameter whether a value is not finite."""
        # A sum is finite only if its terms are; of weights it does not overflow.
        sums = [local(p).sum(dtype=torch.float32) for p in (self._shared | self._copied).values()]
        return torch.stack(sums).isfinite().logical_not()

    def _compare_ranks(self, checksum: int) -> None:
        if self._replicas is None or dist.get_world_size(self._replicas) == 1:
            return
        device = next(iter((self._shared | self._copied).values())).device
        halves = on_device(torch.tensor([checksum & 0xFFFFFFFF, checksum >> 32]), device)
        lowest, highest = halves.clone(), halves.clone()
        dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=self._replicas)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self._replicas)
        if not torch.equal(lowest, highest):
            raise EngineError("the engines of different ranks hold different weights after the sync")


def _placement(tensor: torch.Tensor) -> Any:
    """Tells which part of a tensor this rank holds."""
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None


_WordSum = tuple[int, torch.Tensor]


def _word_sum(name: str, tensor: torch.Tensor) -> _WordSum:
    """An odd number of the parameter's own, and the sum of its bit patterns, on its device."""
    words = local(tensor).detach().contiguous().view(_WORDS[tensor.element_size()])
    factor = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") | 1
    return factor, words.sum(dtype=torch.int64)


def _read(groups: list[list[_WordSum]], flags: torch.Tensor) -> tuple[list[int], list[int]]:
    """The checksum of each group, and the flags, all read from the device at once.

    A checksum is the sum of sums times factors, modulo 2^64: parameters that change places change it.
    """
    sums = [total for group in groups for _, total in group]
    read = on_host(torch.cat([torch.stack(sums), flags.long()]))[0].tolist()
    totals = iter(read)
    return [sum(factor * next(totals) for factor, _ in group) % 2**64 for group in groups], read[len(sums) :]
