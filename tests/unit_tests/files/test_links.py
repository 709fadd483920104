"""Files of strangers are copied only from their own folder: a link to a file elsewhere is refused by name."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from refine_titan.conversion.carried import CARRIED_FILE, CarriedTensors
from refine_titan.conversion.description import find_assets
from refine_titan.conversion.from_hf import from_hf
from refine_titan.conversion.to_hf import to_hf
from refine_titan.data.file_source import FileSource
from refine_titan.data.rows import TextReader
from refine_titan.data.shards import manifest_sha256
from refine_titan.data.sources import list_files
from refine_titan.data.tokenizer import ByteTokenizer
from refine_titan.errors import UserError
from refine_titan.files.links import leads_outside
from refine_titan.models import FAMILIES
from refine_titan.models.hf_files import ASSETS
from refine_titan.models.sizes import resolve_args
from refine_titan.preparation.inputs import find_inputs
from refine_titan.preparation.inspection import verify
from refine_titan.preparation.settings import Settings
from refine_titan.starting_point import describe_run
from refine_titan.validation import load_config
from tests.checkpoints import assert_nothing_left, random_weights, write_hf_folder

ARGS = replace(FAMILIES["delta_net"].flavors["debug"], n_layers=1, vocab_size=8)
SECRET = "the key of somebody"


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "home" / "key"
    path.parent.mkdir()
    path.write_text(SECRET)
    path.chmod(0o600)
    return path


@pytest.fixture
def hf(tmp_path):
    return write_hf_folder(tmp_path / "hf", ARGS, random_weights(ARGS))


def cached(tmp_path, hf):
    """The same folder as Hugging Face's cache has it: a snapshot of links into `blobs`."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0f"
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (hf / "tokenizer.json").write_text("{}")
    for number, path in enumerate(hf.iterdir()):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


@pytest.mark.parametrize("name", ASSETS)
def test_asset_that_is_a_link_out_of_its_folder_is_refused(tmp_path, hf, secret, name):
    (hf / name).symlink_to(secret)
    with pytest.raises(UserError, match=f"{hf}/{name} is a link to {secret}, outside its folder; allowed: "):
        from_hf(hf, tmp_path / "out")
    assert_nothing_left(tmp_path / "out")


@pytest.mark.parametrize("target", ["../home/key", "home/key"])
def test_links_through_folders_lead_outside_too(tmp_path, hf, secret, target):
    (hf / "home").symlink_to(secret.parent)
    (hf / "merges.txt").symlink_to(target)
    with pytest.raises(UserError, match="merges.txt is a link to"):
        find_assets(hf)


def test_links_within_a_folder_and_of_the_cache_are_allowed(tmp_path, hf, secret):
    (hf / "files").mkdir()
    (hf / "files" / "merges").write_text("m")
    (hf / "merges.txt").symlink_to("files/merges")
    (tmp_path / "other").symlink_to(hf)
    assert [path.name for path in find_assets(tmp_path / "other")] == ["merges.txt"]
    (hf / "merges.txt").unlink()
    (hf / "files" / "merges").unlink()
    (hf / "files").rmdir()
    snapshot = cached(tmp_path, hf)
    from_hf(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}" and not (tmp_path / "out" / "tokenizer.json").is_symlink()
    (snapshot / "vocab.json").symlink_to(secret)  # a cache that somebody else wrote
    with pytest.raises(UserError, match="vocab.json is a link to"):
        from_hf(snapshot, tmp_path / "again")
    (snapshot / "vocab.json").unlink()
    (snapshot / "vocab.json").symlink_to("../../blobs/../../home/key")
    with pytest.raises(UserError, match="vocab.json is a link to"):
        from_hf(snapshot, tmp_path / "again")


def test_export_and_run_copy_no_link_either(tmp_path, hf, secret):
    from_hf(hf, tmp_path / "dcp")
    (tmp_path / "dcp" / "tokenizer.json").symlink_to(secret)
    with pytest.raises(UserError, match="dcp/tokenizer.json is a link to"):
        to_hf(tmp_path / "dcp", tmp_path / "out")
    (tmp_path / "dcp" / "tokenizer.json").unlink()
    (hf / "vocab.json").symlink_to(secret)
    with pytest.raises(UserError, match="hf/vocab.json is a link to"):
        to_hf(tmp_path / "dcp", tmp_path / "out", config_path=hf / "config.json")
    assert_nothing_left(tmp_path / "out")
    (hf / "tokenizer.json").write_text("{}")
    config = load_config(["--model.hf_assets_path", str(hf)])
    with pytest.raises(UserError, match="hf/vocab.json is a link to"):
        describe_run(config, resolve_args(config.model), ByteTokenizer())
    (hf / "config.json").rename(tmp_path / "home" / "config.json")
    (hf / "config.json").symlink_to(tmp_path / "home" / "config.json")
    (hf / "vocab.json").unlink()
    with pytest.raises(UserError, match="hf/config.json is a link to"):
        from_hf(hf, tmp_path / "again")


def test_carried_tensors_are_no_link(tmp_path, secret):
    save_file({"a": torch.ones(2)}, tmp_path / "home" / CARRIED_FILE)
    steps = [tmp_path / "checkpoint" / f"step-{n}" for n in (1, 2)]
    for step in steps:
        step.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, steps[0] / CARRIED_FILE)
    (steps[1] / CARRIED_FILE).symlink_to(tmp_path / "home" / CARRIED_FILE)
    with pytest.raises(UserError, match=f"step-2/{CARRIED_FILE} is a link to"):
        CarriedTensors.of_dcp(steps[1])
    carried = CarriedTensors.of_dcp(steps[0])
    (steps[0] / CARRIED_FILE).unlink()  # the run has removed the step
    with pytest.raises(UserError, match=f"step-2/{CARRIED_FILE} is a link to"):
        carried.write(steps[0])


def test_data_that_lie_elsewhere_are_read_and_said(tmp_path, secret, caplog):
    """Folders of links are how many keep their data; what leads out of the folder is named."""
    (secret.parent / "key.txt").write_text(SECRET)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    (folder / "b.txt").symlink_to("a.txt")
    (folder / "c.txt").symlink_to(secret.parent / "key.txt")
    content = list_files(folder, [".txt"])
    said = f"read through links out of the folder, 1: c.txt -> {secret.parent}/key.txt"
    assert said in FileSource(content.files, TextReader("text"), folder, content).description()
    find_inputs([folder], Settings())
    assert f"--input {folder}: 1 file(s) are read through links out of it: c.txt -> " in caplog.text


def test_leads_outside_resolves_every_link(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "x").write_text("")
    os.symlink("../x", tmp_path / "a" / "b" / "up")
    assert leads_outside(tmp_path / "a" / "b" / "up", tmp_path / "a" / "b")
    assert not leads_outside(tmp_path / "a" / "b" / "up", tmp_path / "a")


@pytest.mark.parametrize("name", ["../home/key", "/etc/hostname", "sub/shard.parquet", "..", "", "a\0b", 3, None])
def test_manifest_that_names_a_shard_outside_its_folder_is_refused(tmp_path, secret, name):
    folder = tmp_path / "prepared"
    folder.mkdir()
    shard = {"name": name, "rows": 1, "tokens": 1, "bytes": len(SECRET), "sha256": "0"}
    tokenizer = {"name": "bytes", "sha256": "0", "vocab_size": 257, "package": "1"}
    manifest = {"format": "refine_titan.prepared", "version": 1, "kind": "documents", "tokenizer": tokenizer}
    manifest |= {"lengths": {"shortest": 1, "longest": 1}, "shards": [shard]}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"manifest_sha256": manifest_sha256(manifest)}))
    with pytest.raises(UserError, match="manifest.json is no manifest of prepared data: .*shards"):
        verify(folder)
