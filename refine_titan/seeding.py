"""Every random draw is derived from (seed, what it is for): nothing depends on how many draws came before it."""

import hashlib

import torch


def derive_seed(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for one purpose, e.g. `derive_seed(seed, "rollout", step, sequence)`."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *purpose: int | str) -> torch.Generator:
    """A CPU generator seeded for one purpose. Draws are made on the CPU so that they do not depend on the device."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))
