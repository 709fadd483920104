"""Adds what torchtitan 0.2.2 lacks on a CPU, and measures memory. Written for torch 2.13.0, and checked with it."""

import ctypes
import os
import platform
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
import torch._utils


def announce_device() -> None:
    """Makes torchtitan train on the CPU of a machine without a GPU; changes nothing on one that has a GPU.

    Must run before the first import of torchtitan, which reads the device type at import.
    """
    if torch.cuda.is_available():
        return
    keep_freed_memory()
    torch._utils._get_available_device_type = lambda: "cpu"
    # torchtitan's memory monitor calls these functions of the device module, which torch.cpu does not have.
    torch.cpu.get_device_name = lambda device=None: platform.processor() or platform.machine()
    torch.cpu.get_device_properties = lambda device=None: SimpleNamespace(total_memory=total_memory_bytes())
    torch.cpu.memory_stats = lambda device=None: {
        "active_bytes.all.peak": peak_resident_bytes(),
        "reserved_bytes.all.peak": peak_resident_bytes(),
    }
    torch.cpu.reset_peak_memory_stats = lambda device=None: reset_peak_resident_bytes()
    torch.cpu.empty_cache = lambda: None
    torch.cpu.current_device = lambda: 0  # torch's own returns "cpu", which its barrier does not accept
    # With mixed precision off, torchtitan requests autocast to float32; torch warns and disables autocast, which is intended.
    warnings.filterwarnings("ignore", message="In CPU autocast, but the target dtype is not supported")
    # checkpointing.py saves and loads without collectives in a run of one process.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def peak_resident_bytes() -> int:
    """Highest resident memory of this process since the last reset, in bytes; -1 if the system does not report it."""
    return _status_bytes("VmHWM")


def resident_bytes() -> int:
    """Resident memory of this process in bytes; -1 if the system does not report it."""
    return _status_bytes("VmRSS")


def reset_peak_resident_bytes() -> None:
    """Resets the peak (Linux). Elsewhere the peak remains that since the process began."""
    clear_refs = Path("/proc/self/clear_refs")
    if clear_refs.exists() and os.access(clear_refs, os.W_OK):
        try:
            clear_refs.write_text("5")
        except OSError:  # some sandboxes do not support writing this file: the peak is then that since the process began
            return


# Parameters of mallopt in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Makes the C allocator (glibc) keep the memory of freed tensors for the next ones, unless the environment sets malloc's variables.

    By default it returns every block of 32 MiB or more to the system and later takes fresh pages, which the kernel zeroes one by one. From
    32,768 tokens on this takes half of a step's time. The price of keeping them is one heap with more gaps: docs/performance.md has time
    and memory.
    """
    if platform.libc_ver()[0] == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def release_free_memory() -> None:
    """Returns memory that the C allocator (glibc) holds but does not use to the system, so that peaks can be compared."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return -1
    found = re.search(rf"^{field}:\s+(\d+) kB", status.read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else -1


def total_memory_bytes() -> int:
    """Memory of this machine in bytes, or the limit of its control group (Linux) if that is lower."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    found = [path.read_text().strip() for path in limits if path.is_file()]
    return min([physical, *(int(limit) for limit in found if limit.isdigit())])


def free_memory_bytes() -> int:
    """Memory that this machine could give to a process without swapping, in bytes (Linux; elsewhere the machine's memory); at most the
    limit of its control group."""
    meminfo = Path("/proc/meminfo")
    text = meminfo.read_text() if meminfo.is_file() else ""
    available = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return min(int(available.group(1)) * 1024, total_memory_bytes()) if available else total_memory_bytes()
