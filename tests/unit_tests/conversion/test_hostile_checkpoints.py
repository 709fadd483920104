"""No way into a run executes what a checkpoint holds."""

import io
import pickle
import resource
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from refine_titan.checkpointing import load_plain, resume_step
from refine_titan.conversion.dcp_entries import check_entries
from refine_titan.conversion.dcp_metadata import CheckedReader, DamagedCheckpoint
from refine_titan.errors import UserError
from tests.hostile_checkpoints import poison_entry, poison_metadata, remove_checksums


def state() -> dict:
    optimizer = {"optimizer.lr": 1e-3, "optimizer.betas": (0.9, 0.999)}
    return {"weight": torch.arange(6.0), **optimizer, "train_state": {"step": 3, "name": "run"}, "dataloader.stream_0": "{}"}


@pytest.fixture
def checkpoints(tmp_path):
    folder = tmp_path / "checkpoint"
    for step in (0, 3):
        dcp.save(state(), checkpoint_id=folder / f"step-{step}", no_dist=True)
    return folder


def resume(folder, step: int) -> int | None:
    checkpointer = SimpleNamespace(enable=True, folder=str(folder), load_only=True, exclude_from_loading=[])
    if step == 0:
        shutil.rmtree(folder / "step-3", ignore_errors=True)  # a run goes on from its last checkpoint only
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.get_rank", lambda: 0)
        patch.setattr("torch.distributed.barrier", lambda: None)
        return resume_step(checkpointer, step, num_streams=1)


def test_plain_entries_are_read_as_they_were_written(checkpoints):
    found = {"weight": torch.zeros(6), "optimizer.lr": 0.0, "optimizer.betas": None, "train_state": {"step": 0, "name": ""}}
    load_plain(found, checkpoint_id=str(checkpoints / "step-3"), no_dist=True)
    assert found.pop("weight").tolist() == list(range(6))
    assert found == {name: value for name, value in state().items() if name in found}
    assert resume(checkpoints, 3) == 3 and resume(checkpoints, 0) == 0


@pytest.mark.parametrize("entry", ["train_state.step", "optimizer.betas", "dataloader.stream_0"])
def test_entry_with_a_payload_is_refused_and_not_run(checkpoints, tmp_path, entry):
    marker = tmp_path / "ran"
    poison_entry(checkpoints / "step-3", entry, marker)
    with pytest.raises(UserError, match=rf"step-3/__0_0.distcp: {entry} cannot be read as plain data: .*mkdir"):
        resume(checkpoints, 3)
    with pytest.raises(UserError, match="cannot be read as plain data"):
        load_plain(state(), checkpoint_id=str(checkpoints / "step-3"), no_dist=True)
    assert not marker.exists()
    dcp.load(state(), checkpoint_id=checkpoints / "step-3", no_dist=True)
    assert marker.exists()  # the payload works on whoever trusts it


@pytest.mark.parametrize("step", [0, 3])
def test_metadata_with_a_payload_is_refused_and_not_run(checkpoints, tmp_path, step):
    marker = tmp_path / "ran"
    poison_metadata(checkpoints / f"step-{step}", marker)
    with pytest.raises(UserError, match="cannot be read as DCP metadata: it refers to posix.mkdir"):
        resume(checkpoints, step)
    with pytest.raises(UserError, match="it refers to posix.mkdir"):
        load_plain(state(), checkpoint_id=str(checkpoints / f"step-{step}"), no_dist=True)
    assert not marker.exists()


def test_file_that_is_not_there_is_named(checkpoints):
    reader = CheckedReader(checkpoints / "step-3")
    (checkpoints / "step-3" / "__0_0.distcp").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"step-3 is damaged: \S+ cannot be read from __0_0.distcp: No such file"):
        check_entries(reader)


def test_damage_of_a_runs_own_checkpoint_names_the_way_out(checkpoints):
    (checkpoints / "step-3" / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match="step-3 is damaged: __0_0.distcp does not exist; remove that folder to continue from step-0"):
        resume(checkpoints, 3)
    shutil.rmtree(checkpoints / "step-3")
    (checkpoints / "step-0" / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match="does not exist; remove that folder to start anew: no checkpoint is older"):
        resume(checkpoints, 0)


def test_damaged_entry_is_named(checkpoints):
    file = checkpoints / "step-3" / "__0_0.distcp"
    stored = bytearray(file.read_bytes())
    stored[:] = bytes(len(stored))
    file.write_bytes(bytes(stored))
    with pytest.raises(UserError, match=r"step-3/__0_0.distcp: \S+ cannot be read as plain data"):
        resume(checkpoints, 3)


def test_metadata_that_change_a_class_are_refused(checkpoints):
    """A pickle may set attributes of a class, here for the whole process: every link would then lie in its folder."""
    remove_checksums(checkpoints / "step-3")
    path, meta = "pathlib\nPosixPath\n", "torch.distributed.checkpoint.metadata\nStorageMeta\n"
    state = pickle.NONE + pickle.EMPTY_DICT + b"X\x0e\x00\x00\x00is_relative_to" + pickle.GLOBAL + meta.encode() + pickle.SETITEM
    content = pickle.PROTO + b"\x02" + pickle.GLOBAL + path.encode() + state + pickle.TUPLE2 + pickle.BUILD + pickle.STOP
    (checkpoints / "step-3" / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as DCP metadata: it changes <class 'pathlib.*PosixPath'>"):
        CheckedReader(checkpoints / "step-3").read_metadata()
    assert Path("/a").is_relative_to("/") and not Path("/a").is_relative_to("/b")


def test_metadata_of_ten_bytes_take_no_memory(checkpoints):
    """Python's unpickler in C makes a table of as many objects as the number of the last one."""
    (checkpoints / "step-3" / ".metadata").write_bytes(pickle.PROTO + b"\x02N" + pickle.LONG_BINPUT + b"\xff\xff\xff\x3f" + pickle.STOP)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="cannot be read as DCP metadata: it holds NoneType"):
        CheckedReader(checkpoints / "step-3").read_metadata()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda found: found.state_dict_metadata["weight"].chunks.clear(), "entry 'weight' is neither a tensor nor bytes"),
        (lambda found: setattr(found.state_dict_metadata["weight"], "size", torch.Size([7])), "entry 'weight' is neither"),
        (lambda found: setattr(found.state_dict_metadata["weight"].properties, "dtype", "float"), "entry 'weight' is neither"),
        (lambda found: found.state_dict_metadata.update(more=BytesStorageMetadata()), "entry 'more' has no place in a file"),
        (lambda found: setattr(next(iter(found.storage_data.values())), "offset", -1), "record .* bytes at -1"),
        (lambda found: setattr(next(iter(found.storage_data.values())), "length", None), "record .* has no place in a file"),
        (lambda found: setattr(found, "storage_data", []), "it has no entries"),
        (lambda found: [setattr(stored, "length", 9) for stored in found.storage_data.values()], "entry 'weight' has too few bytes"),
        (lambda found: setattr(next(iter(found.storage_data.values())), "transform_descriptors", ["zstd"]), "record .* stored as .'zstd'."),
    ],
)
def test_metadata_that_contradict_themselves_are_refused(checkpoints, change, problem):
    """What no chunk of a tensor holds would be read as whatever was in memory."""
    metadata = CheckedReader(checkpoints / "step-3").read_metadata()
    change(metadata)
    (checkpoints / "step-3" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=f"cannot be read as DCP metadata: its {problem}".replace("its it", "it")):
        CheckedReader(checkpoints / "step-3").read_metadata()


def test_entry_that_a_checkpoint_lacks_is_named(checkpoints):
    with pytest.raises(UserError, match="step-3 has no entry bias"):
        load_plain({"bias": torch.zeros(2)}, checkpoint_id=str(checkpoints / "step-3"), no_dist=True)


def compress_record(checkpoint: Path, entry: str) -> None:
    """Replaces the record of an entry by the same one with compression, which torch reads as well."""
    metadata = CheckedReader(checkpoint).read_metadata()
    [index] = [index for index in metadata.storage_data if index.fqn == entry]
    stored, small = metadata.storage_data[index], io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(CheckedReader(checkpoint).read_record(index))) as whole:
        with zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as packed:
            for name in whole.namelist():
                packed.writestr(name, whole.read(name))
    with (checkpoint / stored.relative_path).open("ab") as file:
        stored.offset, stored.length = file.tell(), len(small.getvalue())
        file.write(small.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("entry", ["zeros", "text"])
def test_record_that_becomes_larger_is_refused(tmp_path, entry):
    """200 KB of a file would be 200 MB in memory."""
    dcp.save({"zeros": torch.zeros(1 << 16), "text": "a" * (1 << 16)}, checkpoint_id=tmp_path / "step-1", no_dist=True)
    compress_record(tmp_path / "step-1", entry)
    found = {"zeros": torch.ones(1 << 16), "text": ""}
    with pytest.raises(UserError, match=f"{entry}.* (hold 26|hold 6|has too few bytes in a file|hold 7)"):
        load_plain(found, checkpoint_id=str(tmp_path / "step-1"), no_dist=True)
    if entry == "text":
        with pytest.raises(DamagedCheckpoint, match="text cannot be read from __0_0.distcp: its .* bytes hold .*; allowed: records"):
            check_entries(CheckedReader(tmp_path / "step-1"))


def test_compressed_storage_behind_a_small_tensor_is_refused(tmp_path):
    dcp.save({"zeros": torch.zeros(1 << 16)}, checkpoint_id=tmp_path / "step-1", no_dist=True)
    compress_record(tmp_path / "step-1", "zeros")
    metadata = dcp.FileSystemReader(tmp_path / "step-1").read_metadata()
    entry = metadata.state_dict_metadata["zeros"]
    entry.size = entry.chunks[0].sizes = torch.Size([4])
    (tmp_path / "step-1" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(DamagedCheckpoint, match="zeros cannot be read from __0_0.distcp: its .* bytes hold 26.,...; allowed"):
        load_plain({"zeros": torch.ones(4)}, checkpoint_id=str(tmp_path / "step-1"), no_dist=True)
