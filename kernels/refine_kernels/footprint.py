"""Whether operators stand in for a GPU's kernels, for estimates of memory and traffic on machines that have no GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_is_asked_for = ContextVar("gpu_footprint", default=False)


@contextmanager
def gpu_footprint() -> Iterator[None]:
    """Inside, operators that have kernels of their own on a GPU allocate on any device what they would there."""
    token = _is_asked_for.set(True)
    try:
        yield
    finally:
        _is_asked_for.reset(token)


def wants_gpu_footprint() -> bool:
    return _is_asked_for.get()
