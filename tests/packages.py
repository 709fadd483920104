"""Packages that extend refine_titan, installed for a test."""

import shutil
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "edit_distance_reward"


def install_example(folder: Path) -> Path:
    """Installs the example package with pip below `folder`, without network; returns the folder to put on Python's path."""
    source, target = folder / "source", folder / "installed"
    shutil.copytree(EXAMPLE, source)  # building writes beside the source
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--no-compile"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *offline, "--target", str(target), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return target


def write_package(
    folder: Path,
    name: str,
    code: str,
    rewards: dict[str, str] | None = None,
    selections: dict[str, str] | None = None,
    metrics: dict[str, str] | None = None,
):
    """Writes what an installation of a package of one module leaves in `folder`: the module and its metadata.

    Args:
        name: of the package and its module.
        rewards, selections, metrics: names of functions of the module by the name that a setting gives them.
    """
    (folder / f"{name}.py").write_text(code)
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    groups = {"refine_titan.rewards": rewards or {}, "refine_titan.selections": selections or {}, "refine_titan.metrics": metrics or {}}
    lines = [line for group, names in groups.items() for line in (f"[{group}]", *(f"{key} = {name}:{f}" for key, f in names.items()))]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
