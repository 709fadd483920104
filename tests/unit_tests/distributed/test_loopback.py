"""Whatever listens for the ranks of one machine listens on its loopback address."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousParameters

import refine_titan  # noqa: F401  # isort: skip
from refine_titan.distributed.gloo import ADDRESS
from refine_titan.distributed.loopback import LoopbackRendezvous, rank_environment, serve_store
from tests.integration_tests.runs import REPOSITORY, TINY

LISTENING = "0A"
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def listeners_of(pid: int) -> set[tuple[str, int]]:
    """Addresses (as the kernel writes them) and ports on which a process listens."""
    links = []
    with suppress(OSError):  # the process has just gone
        for link in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):  # the file has
                links.append(os.readlink(f"/proc/{pid}/fd/{link}"))
    inodes = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in inodes:
                address, port = fields[1].split(":")
                found.add((address, int(port, 16)))
    return found


def test_store_listens_on_the_loopback_address_only():
    before = listeners_of(os.getpid())
    store = serve_store()
    [(address, port)] = listeners_of(os.getpid()) - before
    assert address in LOOPBACK and port == store.port
    store.set("key", "value")
    assert dist.TCPStore(ADDRESS, port, is_master=False, timeout=timedelta(seconds=10)).get("key") == b"value"


def test_plain_store_would_listen_on_every_interface():
    """The test above can fail."""
    before = listeners_of(os.getpid())
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    assert {address for address, _ in listeners_of(os.getpid()) - before}.isdisjoint(LOOPBACK) and store.port


def be_the_only_rank() -> None:
    environment = dict(os.environ)
    with rank_environment():
        dist.init_process_group("gloo", timeout=timedelta(seconds=30))
        dist.all_reduce(torch.ones(2))
        assert {address for address, _ in listeners_of(os.getpid())} == {"0100007F"}
        dist.destroy_process_group()
    assert dict(os.environ) == environment


def test_only_rank_finds_its_store_and_leaves_the_environment_as_it_was():
    code = f"from {__name__} import be_the_only_rank; be_the_only_rank()"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=outside_of_any_run(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def outside_of_any_run() -> dict[str, str]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")
    return {name: value for name, value in os.environ.items() if name not in names and not name.startswith("TORCHELASTIC")}


def test_launcher_meets_nobody_else():
    handler = LoopbackRendezvous(RendezvousParameters("loopback", "", "run", 1, 1))
    info = handler.next_rendezvous()
    assert (info.rank, info.world_size, info.bootstrap_store_info.master_addr) == (0, 1, ADDRESS)
    assert info.bootstrap_store_info.master_port == handler.next_rendezvous().bootstrap_store_info.master_port


def family_of(pid: int) -> list[int]:
    """A process and those that it started."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [pid, *(descendant for child in children for descendant in family_of(int(child)))]


@pytest.mark.slow
@pytest.mark.parametrize("ranks, engine", [(1, "native"), (2, "native"), (1, "vllm"), (2, "vllm")])
def test_whole_runs_listen_on_the_loopback_address_only(tmp_path, ranks, engine):
    if engine == "vllm":
        pytest.importorskip("vllm")
    job = ["-m", "refine_titan.train", "--job.config_file", TINY, "--job.dump_folder", tmp_path, "--rollout.engine", engine]
    job += ["--training.steps", "2", "--refine.num_mini_batches", "1"]
    launcher = ["-m", "refine_titan.launch", "--rdzv-backend=loopback", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    environment = outside_of_any_run()
    found = set()
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, *map(str, launcher + job)], cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            found |= {listener for pid in family_of(process.pid) for listener in listeners_of(pid)}
            time.sleep(0.2)
    assert process.returncode == 0, (tmp_path / "log").read_text()[-2000:]
    assert len(found) >= ranks and {address for address, _ in found} <= LOOPBACK
