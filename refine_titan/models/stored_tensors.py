"""Tensors as a checkpoint's headers describe them, and their comparison with those that a model has."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, described by its header: dtype, shape and the file's name."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name as configs write it, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def sha256_of_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over name, dtype, shape and bytes of tensors, which come sorted by name; one after the other is copied to the CPU."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {dtype_name(tensor.dtype)} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def mismatches(found: Mapping[str, StoredTensor], expected: Mapping[str, torch.Tensor], source: str = "config.json") -> list[str]:
    """Lists what keeps the tensors of a checkpoint from being those that a model expects.

    Args:
        source: what describes the model, in the messages.

    Returns:
        One line each: first the missing tensors, then the extra ones, then those of another shape or of a dtype that no weight has.
    """
    lines = [f"the weights lack {name}" for name in expected if name not in found]
    lines += [f"the weights have a tensor this model does not know: {name}" for name in found if name not in expected]
    for name, tensor in found.items():
        if name in expected and tensor.shape != tuple(expected[name].shape):
            lines.append(f"{name} has shape {list(tensor.shape)}, {source} says {list(expected[name].shape)}")
        elif name in expected and tensor.dtype not in FLOATING:
            allowed = ", ".join(map(dtype_name, FLOATING))
            lines.append(f"{name} has dtype {dtype_name(tensor.dtype)}; allowed: {allowed}")
    return lines


def first_of(problems: list[str]) -> str:
    """The first of several problems, and how many more there are."""
    more = f" (and {len(problems) - 1} more; refine-titan convert inspect lists them)" if len(problems) > 1 else ""
    return problems[0] + more


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal to the last bit, NaNs included."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
