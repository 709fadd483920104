"""Builds the libraries of the GPU that does nothing, for the environment that runs this: python build.py FOLDER (needs gcc and nm)."""

import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
PACKAGES = Path(sysconfig.get_paths()["purelib"])
CUDA = PACKAGES / "nvidia" / "cu13"
FLAGS = ["-O1", "-w", "-fPIC"]
# NVRTC and cuFile stay what they are.
STUBBED = re.compile(r"(cu[A-Z]|cuda[A-Z]|__cuda|cublas|cudnn|cufft|curand|cusolver|cusparse|cupti|nccl|nvml)\w*$")


def build(folder: Path) -> None:
    """Makes `libcuda.so.1`, which stands in for the driver, the runtime and their libraries, and `libnvidia-ml.so.1`."""
    folder.mkdir(parents=True, exist_ok=True)
    driver, stubs = folder / "driver.o", folder / "stubs.c"
    compile_c(HERE / "driver.c", "-c", f"-I{CUDA / 'include'}", output=driver)
    missing = sorted(asked_for() - symbols([driver], "--defined-only"))
    stubs.write_text("\n".join(f"long {name}(void) {{ return 0; }}" for name in missing))
    library = folder / "libcuda.so.1"
    compile_c(driver, stubs, "-shared", "-Wl,-soname,libcuda.so.1", "-ldl", "-lpthread", output=library)
    compile_c(HERE / "management.c", "-shared", output=folder / "libnvidia-ml.so.1")
    (folder / "libcuda.so").unlink(missing_ok=True)
    (folder / "libcuda.so").symlink_to(library.name)


def asked_for() -> set[str]:
    """Functions that torch's and vLLM's libraries import, that the runtime exports, and that the driver's header declares."""
    importers = [*(PACKAGES / "torch" / "lib").glob("*.so"), *(PACKAGES / "vllm").glob("*.so")]
    runtime = next((CUDA / "lib").glob("libcudart.so.*"))
    header = (CUDA / "include" / "cuda.h").read_text()
    declared = re.findall(r"CUresult\s+CUDAAPI\s+(cu\w+)\(|#define\s+cu\w+\s+(cu\w+_v\d)\b", header)
    names = symbols(importers, "--undefined-only") | symbols([runtime], "--defined-only") | {a or b for a, b in declared}
    return {name for name in names if STUBBED.match(name)}


def symbols(libraries: Iterable[Path], which: str) -> set[str]:
    """Names in the dynamic tables of libraries, or in the table of an object file, without their versions."""
    found = set()
    for library in libraries:
        table = ["-D"] if ".so" in library.name else []
        lines = subprocess.run(["nm", *table, which, str(library)], capture_output=True, text=True, check=True).stdout.splitlines()
        found |= {line.split()[-1].partition("@")[0] for line in lines if line.strip()}
    return found


def compile_c(*arguments: Path | str, output: Path) -> None:
    subprocess.run(["gcc", *FLAGS, *map(str, arguments), "-o", str(output)], check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
