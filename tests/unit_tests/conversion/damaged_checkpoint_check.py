"""Run by torchrun with two ranks: twenty damaged bytes in a sharded checkpoint, and every rank names file and entry. Prints them."""

import random
import sys
from pathlib import Path

import refine_titan  # noqa: F401  # isort: skip
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from refine_titan.checkpointing import load_plain, save_with_checksums
from refine_titan.conversion.dcp_metadata import CheckedReader, DamagedCheckpoint


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensors = {f"layers.{i}.weight": torch.randn(64, 48, generator=torch.Generator().manual_seed(i)) for i in range(4)}
    state = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in tensors.items()} | {"train_state": {"step": 3}}
    save_with_checksums(dcp.save, state, checkpoint_id=str(folder))
    dist.barrier()
    files = sorted(folder.glob("*.distcp"))
    assert len(files) == dist.get_world_size() == len(list(folder.glob("*_checksums.json")))
    draw = random.Random(0)
    for _ in range(20):
        file = draw.choice(files)
        content = file.read_bytes()
        place = draw.randrange(len(content))
        damaged = bytearray(content)
        damaged[place] ^= 0xFF
        dist.barrier()
        if dist.get_rank() == 0:
            file.write_bytes(bytes(damaged))
        dist.barrier()
        stored = CheckedReader(folder).read_metadata().storage_data
        [entry] = [i.fqn for i, s in stored.items() if s.relative_path == file.name and s.offset <= place < s.offset + s.length]
        target = {name: torch.zeros_like(value) if name in tensors else {"step": 0} for name, value in state.items()}
        try:
            load_plain(target, checkpoint_id=str(folder))
            raise AssertionError(f"{entry} in {file.name} was damaged and read")
        except DamagedCheckpoint as error:
            assert (
                str(error) == f"{folder} is damaged: {entry} cannot be read from {file.name}: its checksum is not that of what was written"
            )
            print(entry, file.name, flush=True)
        dist.barrier()
        if dist.get_rank() == 0:
            file.write_bytes(content)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
