"""Names of models in settings: what is downloaded, kept, recorded and refused."""

import json
import os
from pathlib import Path

import pytest
from huggingface_hub import constants

from refine_titan.config.reading import read_config
from refine_titan.errors import UserError
from refine_titan.evaluation.checkpoints import resolve_checkpoint
from refine_titan.evaluation.job import output_folder
from refine_titan.files.limits import MAX_JSON_MIB
from refine_titan.files.links import leads_outside
from refine_titan.files.reasons import in_words, is_about_a_file
from refine_titan.hub.names import with_names
from refine_titan.hub.settings import model_folder, resolve_names
from refine_titan.monitoring.resumed_settings import resumed_settings
from refine_titan.monitoring.run_folder import write_run_files
from refine_titan.starting_point import describe_run
from refine_titan.validation import load_config

NAME = "owner/model"
START = ["--model.flavor", NAME, "--model.hf_assets_path", NAME, "--checkpoint.initial_load_path", NAME]


def downloaded(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def offline(monkeypatch, hub) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()


def test_a_run_starts_from_a_name(hub, model_files, tmp_path):
    commit = hub.put(NAME, model_files)
    config = load_config([*START, "--job.dump_folder", str(tmp_path / "run")])
    folder = tmp_path / "cache" / "hub" / "models--owner--model" / "snapshots" / commit
    assert config.model.flavor == config.model.hf_assets_path == config.checkpoint.initial_load_path == str(folder)
    assert config.checkpoint.initial_load_in_hf
    assert downloaded(folder) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert all(not leads_outside(path, folder) for path in folder.iterdir())


def test_only_small_files_come_without_weights(hub, model_files):
    hub.put(NAME, model_files)
    assert downloaded(model_folder(NAME, "--tokenizer")) == ["config.json", "tokenizer.json"]
    assert "model.safetensors" not in hub.served


def test_shards_are_those_of_the_index(hub, model_files):
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    shards = {"part-1.safetensors": b"1", "part-2.safetensors": b"2", "consolidated.safetensors": b"3"}
    files = {name: data for name, data in model_files.items() if name != "model.safetensors"}
    hub.put(NAME, files | shards | {"model.safetensors.index.json": json.dumps(index).encode()})
    expected = ["config.json", "model.safetensors.index.json", "part-1.safetensors", "part-2.safetensors", "tokenizer.json"]
    assert downloaded(model_folder(NAME, "--checkpoint", weights=True)) == expected


def test_revisions(hub, model_files, tmp_path):
    first = hub.put(NAME, model_files)
    hub.repositories["models", NAME].refs["v1"] = first
    second = hub.put(NAME, {"tokenizer_config.json": b"{}"})
    assert model_folder(NAME, "--tokenizer").name == second
    assert model_folder(f"{NAME}@v1", "--tokenizer").name == model_folder(f"{NAME}@{first}", "--tokenizer").name == first


def test_the_cache_serves_without_a_network(hub, model_files, monkeypatch):
    hub.put(NAME, model_files)
    folder = model_folder(NAME, "--checkpoint", weights=True)
    hub.requests.clear()
    assert model_folder(NAME, "--checkpoint", weights=True) == folder
    assert hub.requests == ["GET /api/models/owner/model"]  # which commit it is today, and nothing else
    offline(monkeypatch, hub)
    assert model_folder(NAME, "--checkpoint", weights=True) == folder and hub.requests == []
    with pytest.raises(
        UserError, match="--x is 'owner/other': no such file or folder here, no model of this name in the cache .*HF_HUB_OF"
    ):
        model_folder("owner/other", "--x")


def test_a_cache_without_weights_is_named(hub, model_files, monkeypatch):
    hub.put(NAME, model_files)
    model_folder(NAME, "--tokenizer")
    offline(monkeypatch, hub)
    with pytest.raises(UserError, match="--checkpoint is 'owner/model.*cache"):
        model_folder(NAME, "--checkpoint", weights=True)


def test_a_cache_that_another_library_has_filled_is_read(hub, model_files, monkeypatch):
    """transformers downloads file by file, and leaves no list of the repository's files."""
    from huggingface_hub import hf_hub_download

    hub.put(NAME, model_files)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        hf_hub_download(NAME, name)
    offline(monkeypatch, hub)
    assert downloaded(model_folder(NAME, "--checkpoint", weights=True)) == ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize(
    "damage, message",
    [
        ("absent", "model.hf_assets_path is 'owner/model': no such file or folder here, and http://127.* shows no model of this name. Is"),
        ("private", "shows no model of this name. Is the name right. A private one needs `hf auth login` or HF_TOKEN"),
        ("gated", "gives this model only to those who have accepted its terms"),
        ("revision", "has this model, but not at the revision 'v9'; allowed: a branch, tag or commit of it"),
        ("unreachable", "no model of this name.* in the cache .*, and http://127.* cannot be reached; check the connection"),
        ("large", "tokenizer.json has 3,145,728 bytes; allowed: at most 2 MiB, or what the environment variable REFINE_TITAN_MAX_JSON_MIB"),
    ],
)
def test_what_cannot_be_had_is_one_line(hub, model_files, damage, message, monkeypatch):
    if damage != "absent":
        hub.put(NAME, model_files | ({"tokenizer.json": b" " * (3 << 20)} if damage == "large" else {}))
        setattr(hub.repositories["models", NAME], damage, True)
    monkeypatch.setenv(MAX_JSON_MIB.variable, "2")
    if damage == "unreachable":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match=message) as caught:
        load_config(["--model.hf_assets_path", f"{NAME}@v9" if damage == "revision" else NAME])
    assert "\n" not in str(caught.value)
    assert hub.served == {}


def test_a_cache_that_cannot_be_written_is_named(hub, model_files, tmp_path, monkeypatch):
    hub.put(NAME, model_files)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(OSError) as caught:
        model_folder(NAME, "--tokenizer")
    assert is_about_a_file(caught.value) and in_words(caught.value).startswith(str(tmp_path / "file"))


def test_weights_that_are_pickled_are_not_downloaded(hub, model_files):
    hub.put(NAME, {name: data for name, data in model_files.items() if name != "model.safetensors"})
    with pytest.raises(UserError, match="no model.safetensors; it holds pytorch_model.bin, but pickled weights are never read"):
        model_folder(NAME, "HF_DIR", weights=True)
    assert "pytorch_model.bin" not in hub.served


def test_an_index_cannot_name_other_files(hub, model_files):
    index = {"model.safetensors.index.json": json.dumps({"weight_map": {"a": "pytorch_model.bin"}}).encode()}
    hub.put(NAME, model_files | index)
    with pytest.raises(UserError, match="names 'pytorch_model.bin'; allowed: files that end in .safetensors"):
        model_folder(NAME, "HF_DIR", weights=True)
    assert "pytorch_model.bin" not in hub.served


def test_a_private_model_comes_with_a_token(hub, model_files, monkeypatch):
    from tests.hub_server import TOKEN

    hub.put(NAME, model_files)
    hub.repositories["models", NAME].private = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (model_folder(NAME, "--tokenizer") / "config.json").is_file()


def test_a_run_records_the_commit_and_resumes_with_it(hub, model_files, tmp_path, monkeypatch):
    first = hub.put(NAME, model_files)
    arguments = [*START, "--job.dump_folder", str(tmp_path / "run")]
    config = load_config(arguments)
    write_run_files(tmp_path / "run", with_names(config.to_dict()))
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["model"]["hf_assets_path"] == recorded["checkpoint"]["initial_load_path"] == f"{NAME}@{first}"
    second = hub.put(NAME, {"tokenizer_config.json": b"{}"})

    resumed = resolve_names(read_config(arguments), resumes=True)
    assert Path(resumed.model.hf_assets_path).name == first  # although the branch has moved
    assert resumed.checkpoint.initial_load_path == f"{NAME}@{first}"  # its own checkpoints have the weights
    step = tmp_path / "run" / "checkpoint" / "step-5"
    step.mkdir(parents=True)
    os.link(os.path.realpath(Path(config.model.flavor, "config.json")), step / "config.json")
    assert resumed_settings(resumed, 5) == []

    moved = resolve_names(read_config([*arguments, "--model.hf_assets_path", f"{NAME}@main"]), resumes=True)
    assert Path(moved.model.hf_assets_path).name == second  # asked for by name, it counts as a changed setting
    anew = resolve_names(read_config(arguments), resumes=False)
    assert Path(anew.model.hf_assets_path).name == second


def test_checkpoints_describe_the_model_without_the_cache(hub, model_files, tmp_path):
    hub.put(NAME, model_files)
    config = load_config([*START, "--job.dump_folder", str(tmp_path / "run")])
    from refine_titan.data.tokenizer import build_tokenizer
    from refine_titan.models.sizes import resolve_args

    description = describe_run(config, resolve_args(config.model), build_tokenizer(config))
    description.write(tmp_path / "step-1")
    assert not (tmp_path / "step-1" / "tokenizer.json").is_symlink()
    assert (tmp_path / "step-1" / "tokenizer.json").read_bytes() == model_files["tokenizer.json"]


def test_an_evaluation_takes_a_name(hub, model_files):
    commit = hub.put(NAME, model_files)
    config = read_config([])
    folder = resolve_checkpoint(config, Path(NAME))
    assert downloaded(folder) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert output_folder(config, folder, None).name == f"owner--model-{commit[:8]}"
