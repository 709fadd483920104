"""Names that refine_titan imports from vLLM, looked up in the CUDA wheel: tests run with the CPU build, which is another package.
(torchtitan and flash-linear-attention are the same package everywhere.)

    python -m pip download --no-deps -d FOLDER vllm==0.32.0     # another index may be needed where pip prefers local builds
    python tests/vllm_cuda_names.py FOLDER/vllm-*.whl           # or a folder in which it is installed: .../site-packages

Writes `tests/assets/vllm_cuda_names.txt`, and ends with status 1 if the wheel lacks a name.
"""

import ast
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
LIST = REPOSITORY / "tests" / "assets" / "vllm_cuda_names.txt"
SOURCES = ("refine_titan", "kernels", "tools")

Read = Callable[[str], str | None]
"""The text of a file in the wheel; None where there is none, empty for compiled modules."""


def imported_names() -> set[str]:
    """`module:name`, or `module` where a module is imported as it is, of all imports from vLLM, those inside functions too."""
    found = set()
    for source in SOURCES:
        for path in (REPOSITORY / source).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found |= {f"{node.module}:{alias.name}" for alias in node.names}
    return {name for name in found if name.partition(":")[0].partition(".")[0] == "vllm"}


def defines(read: Read, name: str) -> bool:
    """Whether a wheel has a module, and it that name."""
    module, _, attribute = name.partition(":")
    base = module.replace(".", "/")
    text = next((text for file in (f"{base}.py", f"{base}/__init__.py", f"{base}.abi3.so") if (text := read(file)) is not None), None)
    if text is None or not attribute:
        return text is not None
    if any(read(f"{base}/{attribute}{end}") is not None for end in (".py", "/__init__.py", ".abi3.so")):
        return True
    # At any depth: under TYPE_CHECKING or try, or as the key of a table of names that are imported when asked for.
    for node in ast.walk(ast.parse(text)):
        names = {
            *([node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []),
            *([alias.asname or alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []),
            *([node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []),
            *([node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []),
        }
        if attribute in names:
            return True
    return False


def reader(path: Path) -> tuple[str, Read]:
    """Version and files of a wheel, or of the folder that one is installed in."""
    if path.is_dir():
        version = next(path.glob("vllm-*.dist-info")).name.removeprefix("vllm-").removesuffix(".dist-info")

        def read(name: str) -> str | None:
            file = path / name
            return None if not file.is_file() else file.read_text() if file.suffix == ".py" else ""

        return version, read
    wheel = zipfile.ZipFile(path)
    files = set(wheel.namelist())
    return path.name.split("-")[1], lambda name: None if name not in files else wheel.read(name).decode() if name.endswith(".py") else ""


def main(path: str) -> int:
    version, read = reader(Path(path))
    names = sorted(imported_names())
    missing = [name for name in names if not defines(read, name)]
    if missing:
        print(f"error: vllm {version} in {path} lacks {', '.join(missing)}", file=sys.stderr)
        return 1
    LIST.write_text("\n".join([f"# What refine_titan imports from the CUDA wheel vllm=={version}: tests/vllm_cuda_names.py", *names, ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
