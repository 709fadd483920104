"""Keeps what the ranks of one machine say to each other on that machine: everything that listens does so on the loopback address.

torch (2.13.0) starts a store for the ranks to meet at, which listens on every interface and trusts whoever connects: the launcher even
unpickles what it finds there. Here the store gets a socket that is bound already.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousParameters, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo

from refine_titan.distributed.gloo import ADDRESS

BACKEND = "loopback"
STORE_TIMEOUT = timedelta(minutes=5)

_stores: list[TCPStore] = []


def serve_store() -> TCPStore:
    """Starts a store on a free port of the loopback address, which lives as long as this process."""
    listener = socket.create_server((ADDRESS, 0))
    port = listener.getsockname()[1]
    store = TCPStore(
        ADDRESS, port, is_master=True, wait_for_workers=False, timeout=STORE_TIMEOUT, use_libuv=True, master_listen_fd=listener.detach()
    )
    _stores.append(store)
    return store


@contextmanager
def rank_environment() -> Iterator[None]:
    """Inside the context, this process is the only rank, if no launcher started it: the environment names a store of its own."""
    if "RANK" in os.environ:
        yield
        return
    variables = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": ADDRESS,
        "MASTER_PORT": str(serve_store().port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the rank connects to the store instead of making one
        "TORCHELASTIC_RESTART_COUNT": "0",
    } | private_interfaces()
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def private_interfaces() -> dict[str, str]:
    """Returns variables with which NCCL meets on the loopback interface; those that are set already stay. For gloo see `gloo.py`."""
    return {"NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", "lo")}


class LoopbackRendezvous(RendezvousHandler):
    """The rendezvous of a launcher that starts all ranks by itself: there is nobody to meet."""

    def __init__(self, parameters: RendezvousParameters):
        self._run_id = parameters.run_id
        self._store: TCPStore | None = None

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        self._store = self._store or serve_store()
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo(ADDRESS, self._store.port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def register_rendezvous() -> None:
    """Makes torchrun know `--rdzv-backend=loopback`."""
    rendezvous_handler_registry.register(BACKEND, LoopbackRendezvous)
