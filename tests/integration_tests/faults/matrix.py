"""The table of places and faults, filled in by the tests of this folder and printed at the end of their run."""

from collections.abc import Iterator
from contextlib import contextmanager

HELD, NOT_HELD = "held", "NOT HELD"
_cells: dict[tuple[str, str], str] = {}


@contextmanager
def cell(place: str, fault: str) -> Iterator[None]:
    """Records whether the block, which injects a fault at a place and checks what must hold afterwards, ends without an error."""
    _cells[place, fault] = NOT_HELD
    yield
    _cells[place, fault] = HELD


def table() -> str:
    """The places in rows, with each fault that was tried there; empty if none was."""
    if not _cells:
        return ""
    width = max(len(place) for place, _ in _cells)
    lines = []
    for place in dict.fromkeys(place for place, _ in _cells):
        faults = [fault if result == HELD else f"{fault}: {result}" for (where, fault), result in _cells.items() if where == place]
        lines.append(f"{place:<{width}}  {len(faults):>2}  {', '.join(faults)}")
    held = sum(result == HELD for result in _cells.values())
    return "\n".join([*lines, f"{held} of {len(_cells)} cells held"])
