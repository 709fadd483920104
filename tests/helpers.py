"""Measures, generators and scripts that several tests share."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from hypothesis import strategies as st

from refine_titan.models import FAMILIES
from refine_titan.models.decoder import DecoderArgs


def relative_rms(found: torch.Tensor, expected: torch.Tensor) -> float:
    """`||found - expected|| / ||expected||`."""
    norm = expected.detach().double().norm()
    difference = (found.detach().double() - expected.detach().double()).norm()
    return float(difference / norm) if norm else float(difference)


def boundaries(lengths: list[int]) -> tuple[int, ...]:
    """`cu_seqlens` of documents of the given lengths."""
    cu_seqlens = [0]
    for length in lengths:
        cu_seqlens.append(cu_seqlens[-1] + length)
    return tuple(cu_seqlens)


@st.composite
def packings(draw, max_documents: int = 4, max_length: int = 150) -> tuple[int, ...]:
    """Document boundaries, with lengths around the chunk size of 64 made likely."""
    length = st.one_of(st.integers(1, max_length), st.sampled_from([1, 2, 3, 63, 64, 65, 127, 128, 129]))
    return boundaries(draw(st.lists(length, min_size=1, max_size=max_documents)))


@st.composite
def positions(draw, cu_seqlens: tuple[int, ...], max_count: int = 5) -> tuple[int, ...]:
    """Positions in 1..T: document starts + 1, chunk borders, document ends, repeated ones and any other."""
    special = [start + 1 for start in cu_seqlens[:-1]] + list(cu_seqlens[1:])
    special += [start + 64 for start, end in zip(cu_seqlens, cu_seqlens[1:]) if start + 64 <= end]
    special += [start + 65 for start, end in zip(cu_seqlens, cu_seqlens[1:]) if start + 65 <= end]
    one = st.one_of(st.integers(1, cu_seqlens[-1]), st.sampled_from(special))
    found = draw(st.lists(one, min_size=1, max_size=max_count))
    return tuple(found + found[:1]) if draw(st.booleans()) else tuple(found)


def two_layers(family: str) -> DecoderArgs:
    """The family's debug model, cut to two layers; those of a hybrid are one of each kind."""
    args = FAMILIES[family].flavors["debug"]
    kinds = {"layer_types": ["linear_attention", "full_attention"]} if args.has_attention else {}
    return replace(args, n_layers=2, **kinds)


def output_of_kernel_check(name: str) -> str:
    """What a script in tests/unit_tests/kernels prints, in a process of its own: Triton's interpreter is switched on before import."""
    return output_of_check("kernels", name)


def output_of_check(folder: str, name: str, *arguments: str) -> str:
    """What a script of a folder in tests/unit_tests prints, in a process of its own."""
    repository = Path(__file__).parents[1]
    script = repository / "tests" / "unit_tests" / folder / f"{name}.py"
    environment = os.environ | {"PYTHONPATH": str(repository)}
    result = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
