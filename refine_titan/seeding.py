"""Derives every random draw from (seed, purpose), so that no draw depends on how many draws came before it."""

import hashlib

import torch


def derive_seed(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for one purpose, for example `derive_seed(seed, "rollout", step, sequence)`."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *purpose: int | str) -> torch.Generator:
    """A CPU generator seeded for one purpose. Drawing on the CPU makes the numbers independent of the device."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))
