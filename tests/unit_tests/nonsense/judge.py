"""What must hold for any input: it works, or one line says what is wrong; soon, and within bounded memory."""

import gc
import os
import resource
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from refine_titan.errors import UserError

# Processor time; other processes of the machine may make an input wait ten times as long.
SECONDS = 1.0
# What one small input may add to the largest memory that this process has had.
BYTES = 256 << 20
# How many examples were tried, by kind and result.
tried: Counter[tuple[str, str]] = Counter()


def counts(usual: int, many: int) -> pytest.MarkDecorator:
    """How many examples a test tries: `usual`, and with --slow `many`."""
    return pytest.mark.parametrize("count", [usual, pytest.param(many, marks=pytest.mark.slow)])


def for_all(strategy: SearchStrategy, count: int, check: Callable[[Any], None]) -> None:
    """Calls `check` with `count` values of a strategy, the same ones in every run."""

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def try_all(value: Any) -> None:
        check(value)

    try_all()


@contextmanager
def works_or_is_refused(kind: str, seconds: float = SECONDS):
    """Fails if the block raises anything but a UserError of one line, or takes too much time or memory."""
    gc.disable()  # collecting what Hypothesis keeps is not the input's doing
    result, begin, started, before = "works", time.process_time(), time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    except UserError as error:
        result = "refused"
        assert str(error) and "\n" not in str(error), repr(str(error))
    except SystemExit as end:
        pytest.fail(f"ends the process with {end.code!r}")
    finally:
        gc.enable()
    spent, waited = time.process_time() - begin, time.perf_counter() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    patience = seconds * (1 + os.getloadavg()[0] / (os.cpu_count() or 1))  # a busy machine works slower
    assert spent < patience and waited < 10 * patience, f"{spent:.1f} s of work, {waited:.1f} s in all"
    assert grown < BYTES, f"{grown:,} bytes more"
    tried[kind, result] += 1


def write(path: Path, content: Any) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path
