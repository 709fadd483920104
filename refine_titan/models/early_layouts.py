"""How flash-linear-attention kept weights until early 2025, where it differs from today."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from refine_titan.models.stored_tensors import StoredTensor


class RowsOf(NamedTuple):
    """A tensor of today that is a part of the rows of an early one."""

    whole: str
    first: int
    end: int


def split_gates(tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], dict[str, RowsOf]]:
    """Tells apart the gate and the up projection of MLPs that hold both in `gate_proj`, the gate's rows first.

    Returns:
        All tensors as today's library names them, and for those that are rows of an early one, which.
    """
    found, rows = dict(tensors), {}
    for name, stored in tensors.items():
        mlp = re.fullmatch(r"(.*\bmlp\.)gate_proj(\.weight)", name)
        if mlp is None:
            continue
        up, down = (tensors.get(f"{mlp[1]}{part}_proj{mlp[2]}") for part in ("up", "down"))
        if up is None and down is not None and len(stored.shape) == len(down.shape) == 2 and stored.shape[0] == 2 * down.shape[1]:
            width, columns = down.shape[1], stored.shape[1]
            for part, first in (("gate", 0), ("up", width)):
                own = f"{mlp[1]}{part}_proj{mlp[2]}"
                found[own], rows[own] = replace(stored, shape=(width, columns)), RowsOf(name, first, first + width)
    return found, rows
