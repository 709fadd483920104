"""`locks/`: that they agree with pyproject.toml, and that the set-up installs only files that they name."""

import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import lock_dependencies as locks

REPOSITORY = Path(__file__).parents[2]


def entries_of(build: str, *names: str) -> list[Requirement]:
    """The requirements that are locked for a build in some of its files."""
    found = []
    for name in names:
        for entry in locks.entries((locks.LOCKS / build / f"{name}.txt").read_text(encoding="utf-8")):
            found.append(Requirement(entry.split(" \\\n")[0]))
    return found


def versions_of(build: str, *names: str) -> dict[str, set[str]]:
    """Locked versions by package; more than one only where Pythons or machines differ."""
    found: dict[str, set[str]] = {}
    for entry in entries_of(build, *names):
        (specifier,) = entry.specifier
        assert specifier.operator == "=="
        found.setdefault(canonicalize_name(entry.name), set()).add(specifier.version)
    return found


def test_locks_were_made_for_the_dependencies_that_pyproject_names():
    assert locks.check() == []


@pytest.mark.parametrize("build", locks.BUILDS)
def test_every_requirement_of_pyproject_is_locked_in_a_version_that_it_allows(build):
    project = locks.project()
    base = ["base", *(["torch"] if build == "cpu" else [])]
    for extra in ["", build, *locks.extras()]:
        wanted = project["optional-dependencies"][extra] if extra else project["dependencies"]
        locked = versions_of(build, *base, *([extra] if extra in locks.extras() else []))
        for requirement in map(Requirement, wanted):
            found = locked.get(canonicalize_name(requirement.name), set())
            assert found and all(requirement.specifier.contains(version) for version in found), f"{requirement} of {extra}: {found}"


@pytest.mark.parametrize("name", locks.lock_names())
def test_lock_has_versions_markers_and_hashes_only(name):
    lines = (locks.LOCKS / name).read_text(encoding="utf-8").splitlines()
    assert "".join(lines[:2]).count("#") == 2
    pin = re.compile(r"[a-z0-9-]+==[a-zA-Z0-9.+]+( ; [a-z_0-9=' .()]+)? \\")
    hashes = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")
    for line, following in zip(lines[2:], [*lines[3:], ""]):
        if not line.startswith(" "):
            assert pin.fullmatch(line), line
            assert following.startswith("    --hash="), f"{line} has no hash"
        else:
            assert hashes.fullmatch(line), line


def test_locked_packages_ask_for_nothing_that_is_not_locked():
    """By what the installed ones say, since a resolver reads one wheel's metadata and takes the others' for the same."""
    locked = versions_of("cpu", "torch", "base", "dev")
    missing = []
    for name, versions in locked.items():
        if (version := installed_version(name)) not in versions:
            continue  # another machine or Python, or an environment that was set up without the locks
        for requirement in map(Requirement, importlib.metadata.requires(name) or []):
            wanted = canonicalize_name(requirement.name)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            if wanted not in locks.CUDA_ONLY and not any(requirement.specifier.contains(v) for v in locked.get(wanted, ())):
                missing.append(f"{name} {version} asks for {requirement}")
    assert missing == []


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def test_markers_say_only_where_a_requirement_applies():
    everywhere = "python_full_version < '3.14' and (platform_machine == 'aarch64' or platform_machine == 'x86_64')"
    assert locks.with_short_marker(f"a==1 ; {everywhere} \\\n    --hash=x") == "a==1 \\\n    --hash=x"
    assert locks.with_short_marker("a==1 ; python_full_version >= '3.12' and sys_platform == 'linux'").endswith(
        " ; python_version == '3.12' or python_version == '3.13'"
    )
    mixed = "platform_machine == 'aarch64' or (platform_machine == 'x86_64' and python_full_version < '3.12')"
    short = Requirement(locks.with_short_marker(f"a==1 ; {mixed}")).marker
    for machine, python, applies in [("aarch64", "3.13", True), ("x86_64", "3.11", True), ("x86_64", "3.12", False)]:
        assert short.evaluate({"platform_machine": machine, "python_version": python}) == applies


def test_hashes_of_torch_are_those_of_the_supported_pythons_and_machines():
    wheels = {"cp311-cp311-manylinux_2_28_x86_64": "a", "cp312-cp312-manylinux_2_28_aarch64": "b", "cp313-cp313-win_amd64": "c"}
    wheels |= {"cp313-cp313t-manylinux_2_28_x86_64": "d", "cp314-cp314-manylinux_2_28_x86_64": "e"}
    page = "".join(f'<a href="/whl/cpu/torch-2.13.0%2Bcpu-{tag}.whl#sha256={digit * 64}">torch</a>\n' for tag, digit in wheels.items())
    page += f'<a href="/whl/cpu/torch-2.12.0%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl#sha256={"f" * 64}">torch</a>'
    assert locks.torch_hashes(page, "2.13.0") == ["a" * 64, "b" * 64]


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project with one dependency, `probe`, its locks, its set-up, and a virtual environment with real pip."""
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "small"\nversion = "1"\nrequires-python = ">=3.11"\ndependencies = ["probe==1.0"]\n'
        "[project.optional-dependencies]\ncpu = []\ngpu = []\n[tool.setuptools]\npackages = []\n"
    )
    (tmp_path / "tools").mkdir()
    for name in ("setup_environment.sh", "lock_dependencies.py"):
        shutil.copy(REPOSITORY / "tools" / name, tmp_path / "tools")
    monkeypatch.setattr(locks, "ROOT", tmp_path)
    monkeypatch.setattr(locks, "LOCKS", tmp_path / "locks")
    (tmp_path / "wheels").mkdir()
    content = wheel(tmp_path / "wheels")
    for name in locks.lock_names():
        write_lock(name, hashlib.sha256(content).hexdigest() if name == "gpu/base.txt" else None)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True, timeout=60)
    site = next((tmp_path / ".venv" / "lib").iterdir()) / "site-packages"
    (site / "pip.pth").write_text(str(Path(importlib.metadata.distribution("pip").locate_file(""))))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def wheel(folder: Path) -> bytes:
    """Writes a wheel of `probe` 1.0; returns its bytes."""
    path = folder / "probe-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("probe.py", "")
        archive.writestr("probe-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: probe\nVersion: 1.0\n")
        archive.writestr("probe-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("probe-1.0.dist-info/RECORD", "")
    return path.read_bytes()


def write_lock(name: str, digest: str | None) -> None:
    """A lock of `probe`, or one without packages."""
    path = locks.LOCKS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    requirement = f"probe==1.0 \\\n    --hash=sha256:{digest}\n" if digest else ""
    path.write_text(f"{locks.HEADER}{locks.checksum()}\n{requirement}")


def bash(command: str) -> subprocess.CompletedProcess:
    """Runs a command as run_tests.sh would, after the functions of the set-up have been read."""
    command = f"set -euo pipefail; source tools/setup_environment.sh; {command}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)


INSTALL = "install_project .venv/bin/python gpu >.venv/log 2>&1 || { explain_failure .venv/log gpu; exit 1; }"


def test_setup_installs_what_the_locks_name(project):
    result = bash(INSTALL)
    assert result.returncode == 0, (project / ".venv" / "log").read_text()
    found = subprocess.run([".venv/bin/python", "-c", "import probe; print(probe.__file__)"], capture_output=True, text=True, timeout=60)
    assert found.stdout.startswith(str(project / ".venv"))


def test_setup_refuses_another_file_and_names_the_package(project):
    write_lock("gpu/base.txt", "0" * 64)
    result = bash(INSTALL)
    said = "error: the file that pip found for probe==1.0 is not one of those in locks/gpu: its sha256 is another."
    assert result.returncode == 1 and result.stdout.startswith(said) and result.stdout.count("\n") == 1
    assert subprocess.run([".venv/bin/python", "-c", "import probe"], capture_output=True, timeout=60).returncode == 1


def test_setup_names_the_package_that_no_index_has(project):
    (project / "wheels" / "probe-1.0-py3-none-any.whl").unlink()
    result = bash(INSTALL)
    said = "error: pip's package indexes have no file of probe==1.0 for this machine and Python, which locks/gpu names."
    assert result.returncode == 1 and result.stdout.startswith(said) and result.stdout.count("\n") == 1


@pytest.mark.parametrize("change", ["dependency", "missing", "superfluous"])
def test_setup_refuses_locks_that_do_not_agree(project, change):
    text = (project / "pyproject.toml").read_text()
    if change == "dependency":
        (project / "pyproject.toml").write_text(text.replace("probe==1.0", "probe==2.0"))
    elif change == "missing":
        (project / "locks" / "cpu" / "base.txt").unlink()
    else:
        write_lock("gpu/gone.txt", None)
    result = bash(INSTALL)
    assert result.returncode == 1 and result.stdout.startswith("error: locks/") and result.stdout.count("\n") == 1
    assert {"dependency": "other dependencies", "missing": "is missing", "superfluous": "belongs to no"}[change] in result.stdout


def test_change_of_the_tables_of_other_tools_needs_no_new_locks(project):
    path = project / "pyproject.toml"
    path.write_text(path.read_text() + "[tool.ruff]\nline-length = 100\n")
    assert locks.check() == []


def test_environment_without_hashes_is_not_taken_for_one_with(project, monkeypatch):
    """The stamps differ, and the locked set-up begins anew."""
    stand_in = "install_project() { :; }; make_venv() { mkdir .venv; touch .venv/new; }; build_of_this_machine() { echo cpu; }; "
    setup = stand_in + "setup_environment dev"
    monkeypatch.setenv("REFINE_TITAN_UNLOCKED", "1")
    assert bash(setup).returncode == 0
    stamp = (project / ".venv" / ".installed").read_text().splitlines()
    assert stamp[0].startswith("cpu-unlocked ") and stamp[1:] == ["dev"]
    assert not (project / ".venv" / "new").exists()
    monkeypatch.setenv("REFINE_TITAN_UNLOCKED", "0")
    assert bash(setup).returncode == 0
    assert (project / ".venv" / "new").exists()
    assert (project / ".venv" / ".installed").read_text().startswith("cpu ")
