"""Imports go downwards only, and never in a circle: the floors of `docs/architecture.md`."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
# Rooms from the ground up. A file imports from its own room and from the floors below; two rooms of one floor do not know each other.
FLOORS = [
    ["refine_titan.errors"],
    [
        "refine_kernels",
        "refine_titan.config",
        "refine_titan.files",
        "refine_titan.progress",
        "refine_titan.rank_messages",
        "refine_titan.seeding",
        "refine_titan.terminal",
        "refine_titan.torch_import",
        "refine_titan.worker_process",
    ],
    ["refine_titan.models", "refine_titan.objective"],
    ["refine_titan.conversion", "refine_titan.hub"],
    ["refine_titan.distributed", "refine_titan.data", "refine_titan.checkpointing", "refine_titan.starting_point"],
    ["refine_titan.rollout", "refine_titan.preparation", "refine_titan.registration"],
    ["refine_titan.validation"],
    ["refine_titan.inference", "refine_titan.estimation", "refine_titan.monitoring"],
    ["refine_titan.steps", "refine_titan.benchmarks", "refine_titan.report", "refine_titan.dry_run", "refine_titan.launch"],
    ["refine_titan.trainer", "refine_titan.evaluation"],
    ["refine_titan.train", "refine_titan.reproduction"],
    ["refine_titan.commands"],
    ["refine_titan.__main__"],
]
# Importing any module runs the package's own `__init__`, which announces the device to torch: it stands outside the house.
OUTSIDE = "refine_titan"


def modules() -> dict[str, Path]:
    """Every module of both packages by its dotted name."""
    found = {}
    for folder in (REPOSITORY / "refine_titan", REPOSITORY / "kernels" / "refine_kernels"):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file names in its imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in MODULES else node.module)
    return found & MODULES.keys()


def room_of(module: str) -> tuple[int, str]:
    """Floor and room of a module."""
    for floor, rooms in enumerate(FLOORS, start=1):
        for room in rooms:
            if module == room or module.startswith(room + "."):
                return floor, room
    raise AssertionError(f"{module} has no room in FLOORS")


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {OUTSIDE}))
def test_imports_go_down(module):
    floor, room = room_of(module)
    for imported in imports_of(MODULES[module]) - {OUTSIDE}:
        other_floor, other_room = room_of(imported)
        assert other_room == room or other_floor < floor, f"{module} (floor {floor}) imports {imported} (floor {other_floor})"


def test_what_announces_the_device_imports_nothing_of_ours():
    for imported in imports_of(MODULES[OUTSIDE]):
        assert room_of(imported)[1] == "refine_kernels" or imports_of(MODULES[imported]) <= {"refine_titan.errors"}
    assert not imports_of(MODULES["refine_titan.errors"])


def test_no_circle():
    imports = {module: imports_of(path) - {module} for module, path in MODULES.items()}
    finished = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in finished:
            return
        for imported in sorted(imports[module]):
            visit(imported, [*path, module])
        finished.add(module)

    for module in sorted(MODULES):
        visit(module, [])


def test_every_room_of_the_table_is_there():
    for rooms in FLOORS:
        for room in rooms:
            assert room in MODULES


def test_the_map_has_the_same_floors():
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = {int(floor): rooms for floor, rooms in re.findall(r"^\| (\d+) \| (.+?) \|", page, re.MULTILINE)}
    for floor, rooms in enumerate(FLOORS, start=1):
        paths = [path.removesuffix("/").removesuffix(".py") for path in re.findall(r"`(.+?)`", rows.pop(floor))]
        found = {"refine_kernels" if path == "kernels/refine_kernels" else f"refine_titan.{path}" for path in paths}
        assert found == set(rooms), f"floor {floor}"
    assert not rows
