"""Everything torchtitan 0.2.2 lacks on a CPU, in one place: written for torch 2.13.0, checked there."""

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
    torch._utils._get_available_device_type = lambda: "cpu"
    # torchtitan's memory monitor calls these on the device module; torch.cpu does not have them.
    torch.cpu.get_device_name = lambda device=None: platform.processor() or platform.machine()
    torch.cpu.get_device_properties = lambda device=None: SimpleNamespace(total_memory=total_memory_bytes())
    torch.cpu.memory_stats = lambda device=None: {
        "active_bytes.all.peak": peak_resident_bytes(),
        "reserved_bytes.all.peak": peak_resident_bytes(),
    }
    torch.cpu.reset_peak_memory_stats = lambda device=None: reset_peak_resident_bytes()
    torch.cpu.empty_cache = lambda: None
    torch.cpu.current_device = lambda: 0  # torch's own gives "cpu", which its barrier does not take
    # torchtitan asks for autocast to float32 where mixed precision is off; torch disables it, which is what is meant.
    warnings.filterwarnings("ignore", message="In CPU autocast, but the target dtype is not supported")
    # checkpointing.py saves and loads one process's checkpoints without collectives on purpose.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def peak_resident_bytes() -> int:
    """Highest resident memory of this process since the last reset, in bytes; -1 where the system does not tell."""
    return _status_bytes("VmHWM")


def resident_bytes() -> int:
    """Resident memory of this process in bytes; -1 where the system does not tell."""
    return _status_bytes("VmRSS")


def reset_peak_resident_bytes() -> None:
    """Starts a new peak measurement (Linux); elsewhere the peak stays that of the process's life."""
    clear_refs = Path("/proc/self/clear_refs")
    if clear_refs.exists() and os.access(clear_refs, os.W_OK):
        try:
            clear_refs.write_text("5")
        except OSError:  # sandboxes without this file's write operation: the peak is then of the whole life
            return


def release_free_memory() -> None:
    """Returns memory the C allocator holds but does not use (glibc), so that peaks can be compared."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return -1
    found = re.search(rf"^{field}:\s+(\d+) kB", status.read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else -1


def total_memory_bytes() -> int:
    """Memory of this machine, or what its control group allows (Linux), in bytes."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    found = [path.read_text().strip() for path in limits if path.is_file()]
    return min([physical, *(int(limit) for limit in found if limit.isdigit())])


def free_memory_bytes() -> int:
    """Memory that this machine could give to a process (Linux: without swapping), in bytes."""
    available = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(available.group(1)) * 1024 if available else total_memory_bytes()
