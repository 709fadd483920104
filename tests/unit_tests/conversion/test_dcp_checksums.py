"""Checksums of checkpoints: written with the data, compared wherever data are read."""

import json
import os
import pickle
import random
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash

from refine_titan.checkpointing import load_plain, save_with_checksums
from refine_titan.conversion import dcp_checksums
from refine_titan.conversion.dcp_checksums import METADATA_CHECKSUM, METADATA_FILE
from refine_titan.conversion.dcp_metadata import CheckedReader, DamagedCheckpoint
from refine_titan.conversion.inspection import inspect
from refine_titan.errors import UserError
from tests.hostile_checkpoints import remove_checksums
from tests.integration_tests.runs import REPOSITORY

DATA, SUMS = "__0_0.distcp", "__0_checksums.json"


def state() -> dict:
    draw = torch.Generator().manual_seed(0)
    tensors = {f"layers.{i}.weight": torch.randn(40, 30, generator=draw) for i in range(4)}
    return {**tensors, "train_state": {"step": 3, "names": ["a", "b"]}}


@pytest.fixture
def folder(tmp_path):
    save_with_checksums(dcp.save, state(), checkpoint_id=str(tmp_path / "step-3"), no_dist=True)
    return tmp_path / "step-3"


def load(folder) -> dict:
    found = {name: torch.zeros_like(x) if isinstance(x, torch.Tensor) else None for name, x in state().items()}
    found["train_state"] = {"step": 0, "names": None}
    load_plain(found, checkpoint_id=str(folder), no_dist=True)
    return found


def test_every_record_and_no_other_byte_has_a_checksum(folder):
    metadata, content = CheckedReader(folder).read_metadata(), (folder / DATA).read_bytes()
    pieces = {(start, length): checksum for start, length, checksum in json.loads((folder / SUMS).read_text())["files"][DATA]}
    records = {(stored.offset, stored.length) for stored in metadata.storage_data.values()}
    assert records == pieces.keys() and sum(length for _, length in pieces) == len(content)
    for (start, length), checksum in pieces.items():
        assert checksum == xxhash.xxh3_64_hexdigest(content[start : start + length])
    assert (folder / METADATA_CHECKSUM).read_text() == xxhash.xxh3_64_hexdigest((folder / METADATA_FILE).read_bytes())


def test_what_was_written_is_read(folder):
    found = load(folder)
    assert all(torch.equal(found[name], x) for name, x in state().items() if isinstance(x, torch.Tensor))
    assert found["train_state"] == state()["train_state"]
    dcp.load(found, checkpoint_id=folder, no_dist=True)  # other programs read it too


def test_damage_anywhere_names_file_and_entry(folder):
    """One byte more than before, at twenty random places: most lie in the values of a tensor, where torch sees nothing."""
    content, draw, named = (folder / DATA).read_bytes(), random.Random(0), set()
    for place in draw.sample(range(len(content)), 20):
        damaged = bytearray(content)
        damaged[place] = (damaged[place] + 1) % 256
        (folder / DATA).write_bytes(bytes(damaged))
        [entry] = [
            index.fqn
            for index, stored in CheckedReader(folder).read_metadata().storage_data.items()
            if stored.offset <= place < stored.offset + stored.length
        ]
        with pytest.raises(DamagedCheckpoint, match=f"step-3 is damaged: {entry} cannot be read from {DATA}: its checksum is not that"):
            load(folder)
        assert any(entry in line for line in inspect(folder).problems)
        named.add(entry)
    assert len(named) > 3


def test_damaged_metadata_is_named(folder):
    metadata = CheckedReader(folder).read_metadata()
    next(iter(metadata.storage_data.values())).offset += 1
    (folder / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    with pytest.raises(DamagedCheckpoint, match="step-3 is damaged: .metadata does not have the checksum of what was written"):
        load(folder)


@pytest.mark.parametrize("content", ["", "{}", '{"algorithm": "crc", "files": {}}', '{"algorithm": "xxh3_64", "files": 3}'])
def test_damaged_checksums_are_named(folder, content):
    (folder / SUMS).write_text(content)
    with pytest.raises(UserError, match=f"step-3/{SUMS} cannot be read as checksums: "):
        load(folder)


def test_record_without_a_checksum_among_others_is_refused(folder):
    sums = json.loads((folder / SUMS).read_text())
    sums["files"][DATA].pop()
    (folder / SUMS).write_text(json.dumps(sums))
    with pytest.raises(DamagedCheckpoint, match=r"no file __\*_checksums.json has its checksum"):
        load(folder)


def test_checkpoint_whose_checksums_are_gone_is_refused(folder):
    """Metadata with a checksum are this program's, and so are data that have lost theirs."""
    (folder / SUMS).unlink()
    with pytest.raises(DamagedCheckpoint, match="step-3 is damaged: it has .metadata.xxh3, but no file __0_checksums.json"):
        load(folder)


def test_checkpoint_of_another_program_loads_with_one_line(folder, caplog):
    remove_checksums(folder)
    caplog.set_level("INFO")
    assert load(folder)["train_state"] == state()["train_state"]
    lines = [record.getMessage() for record in caplog.records if "checksums" in record.getMessage()]
    assert lines == [f"{folder} has no checksums: its data are not compared with what was written"]


def test_damage_that_torch_finds_is_named_without_checksums(folder):
    remove_checksums(folder)
    content = (folder / DATA).read_bytes()
    (folder / DATA).write_bytes(bytes(len(content)))
    with pytest.raises(UserError, match=r"cannot be read"):
        load(folder)


def test_asynchronous_writing_has_checksums_too(tmp_path):
    started = threading.active_count()
    save_with_checksums(dcp.async_save, state(), checkpoint_id=str(tmp_path / "step-4"), no_dist=True).result(timeout=60)
    assert load(tmp_path / "step-4")["train_state"] == state()["train_state"] and started > 0
    assert (tmp_path / "step-4" / SUMS).is_file()


@pytest.mark.slow
def test_damage_in_a_sharded_checkpoint_is_named_by_every_rank(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    command = [*launcher, "-m", "tests.unit_tests.conversion.damaged_checkpoint_check", str(tmp_path / "step-3")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(result.stdout.split("\n")) == 2 * 20 + 1


def test_disk_without_room_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(dcp_checksums, "free_bytes", lambda path: 19_000)
    with pytest.raises(UserError, match=r"step-3 needs 19,200 bytes; 19,000 bytes are free"):
        save_with_checksums(dcp.save, state(), checkpoint_id=str(tmp_path / "step-3"), no_dist=True)
    assert os.listdir(tmp_path / "step-3") == []
