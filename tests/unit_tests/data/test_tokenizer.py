"""Tokenizers as people have them: parts without a tokenizer.json, pointers, damage, and every file that names end-of-sequence."""

import json
from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer

from refine_titan.config.sections import JobConfig
from refine_titan.data.end_of_sequence import end_of_sequence_ids
from refine_titan.data.tokenizer import ByteTokenizer, build_tokenizer, load_tokenizer
from refine_titan.errors import UserError
from refine_titan.evaluation.checkpoints import with_tokenizer
from refine_titan.files.git_lfs import LFS_POINTER
from refine_titan.inference import check_checkpoint, stop_tokens
from refine_titan.models import FAMILIES
from refine_titan.models.hf_weights import HFWeights
from refine_titan.models.model_config import ModelConfig
from refine_titan.models.sizes import resolve_args
from refine_titan.preparation.run import prepare
from refine_titan.preparation.settings import Settings
from refine_titan.validation import load_config
from tests.checkpoints import random_weights, write_hf_folder

TEXT = "Document #### ## naïve word stands before word 漢字. " * 20
POINTER = LFS_POINTER + b"v1\noid sha256:" + b"0" * 64 + b"\nsize 2133344\n"


def write_parts(folder: Path, vocab_size: int = 288, **config) -> ByteLevelBPETokenizer:
    """`vocab.json` and `merges.txt` of a small tokenizer of GPT-2's kind, some of whose merges begin with #."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT], vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_model(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", **config}))
    assert any(line.startswith("# ") for line in (folder / "merges.txt").read_text().splitlines())
    return tokenizer


def test_vocabulary_and_merges_are_a_tokenizer_for_all_programs(tmp_path):
    tokens = write_parts(tmp_path / "parts").encode(TEXT).ids
    config = load_config(["--model.hf_assets_path", str(tmp_path / "parts"), "--data.source", "synthetic"])
    tokenizer = build_tokenizer(config)
    assert tokenizer.encode(TEXT) == tokens and tokenizer.decode(tokens) == TEXT and tokenizer.eos_id == 0
    (tmp_path / "a.txt").write_text(TEXT)
    prepare([tmp_path / "a.txt"], str(tmp_path / "parts"), tmp_path / "prepared", Settings(min_tokens=1), workers=1)
    manifest = json.loads((tmp_path / "prepared" / "manifest.json").read_text())
    assert manifest["lengths"]["longest"] == len(tokens)
    assert with_tokenizer(JobConfig(), tmp_path / "parts").model.hf_assets_path == str(tmp_path / "parts")


def test_end_of_sequence_may_be_the_beginning_too(tmp_path):
    write_parts(tmp_path, bos_token="<|endoftext|>")
    assert load_tokenizer(str(tmp_path), "model.hf_assets_path").eos_id == 0


@pytest.mark.parametrize("missing", ["merges.txt", "vocab.json"])
def test_a_folder_without_a_tokenizer_is_named(tmp_path, missing):
    write_parts(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match="--tokenizer is '.*', which holds neither tokenizer.json nor vocab.json with merges.txt"):
        load_tokenizer(str(tmp_path), "--tokenizer")
    with pytest.raises(UserError, match=r"model.hf_assets_path is '.*', which holds no tokenizer.json \(nor vocab.json with merges.txt\)"):
        load_config(["--model.hf_assets_path", str(tmp_path)])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"])
@pytest.mark.parametrize("damage", ["pointer", "empty", "truncated"])
def test_damaged_files_of_a_tokenizer_are_named(tmp_path, name, damage):
    tokenizer = write_parts(tmp_path, vocab_size=400)
    if name == "tokenizer.json":
        tokenizer.save(str(tmp_path / name))
    if name == "special_tokens_map.json":
        (tmp_path / name).write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes({"pointer": POINTER, "empty": b"", "truncated": content[: len(content) // 2]}[damage])
    message = "is a Git LFS pointer, not the file: run git lfs pull" if damage == "pointer" else ""
    with pytest.raises(UserError, match=f"model.hf_assets_path: .*{name}.*{message}"):
        load_tokenizer(str(tmp_path), "model.hf_assets_path")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["pointer", "empty", "truncated"])
def test_damaged_files_of_a_model_are_named(tmp_path, name, damage):
    args = FAMILIES["delta_net"].flavors["debug"]
    folder = write_hf_folder(tmp_path / "hf", args, random_weights(args))
    (folder / "tokenizer.json").write_text("{" + " " * 100 + "}")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes({"pointer": POINTER, "empty": b"", "truncated": content[: len(content) // 2]}[damage])
    config = JobConfig()
    config.model.name, config.model.flavor = "delta_net", "debug"
    message = f"{name}.* is a Git LFS pointer, not the file: run git lfs pull" if damage == "pointer" else name
    with pytest.raises(UserError, match=message):
        check_checkpoint(config, resolve_args(config.model), folder)
        build_tokenizer(with_tokenizer(config, folder))


def test_pointers_among_shards_are_named(tmp_path):
    args = FAMILIES["delta_net"].flavors["debug"]
    folder = write_hf_folder(tmp_path / "hf", args, random_weights(args), shard_of=lambda name: len(name) % 2)
    (folder / "part-1.safetensors").write_bytes(POINTER)
    with pytest.raises(UserError, match="part-1.safetensors is a Git LFS pointer, not the file: run git lfs pull; .*index.json says that"):
        HFWeights(folder).check(ModelConfig.read(folder))


FILES = {
    "tokenizer_config.json": {"eos_token": {"content": "<|endoftext|>"}},
    "special_tokens_map.json": {"eos_token": "w"},
    "generation_config.json": {"eos_token_id": [7, 9]},
    "config.json": {"eos_token_id": 11, "text_config": {"eos_token_id": [12]}},
}


@pytest.mark.parametrize(
    "names, expected",
    [
        (("tokenizer_config.json",), (0,)),
        (("generation_config.json",), (7, 9)),
        (("config.json",), (11, 12)),
        (("special_tokens_map.json", "config.json"), ("w", 11, 12)),
        (tuple(FILES), (0, "w", 7, 9, 11, 12)),
        ((), ()),
    ],
)
@pytest.mark.parametrize("beside_tokenizer", [True, False])
def test_every_file_may_name_the_end_of_sequence(tmp_path, names, expected, beside_tokenizer):
    """The files lie beside the tokenizer, or in the folder of the weights."""
    folder = tmp_path / "tokenizer"
    write_parts(folder)
    (folder / "tokenizer_config.json").unlink()
    (tmp_path / "weights").mkdir()
    for name in names:
        place = folder if beside_tokenizer else tmp_path / "weights"
        (place / name).write_text(json.dumps(FILES[name]))
    tokenizer = load_tokenizer(str(folder), "model.hf_assets_path")
    found = end_of_sequence_ids(tokenizer, [folder, tmp_path / "weights"])
    assert found == tuple(tokenizer.token_to_id(token) if isinstance(token, str) else token for token in expected)
    if beside_tokenizer:
        assert tokenizer.eos_id == (found[0] if found else None)


def test_a_run_finds_the_files_of_its_start_and_of_its_own_checkpoint(tmp_path):
    args = FAMILIES["delta_net"].flavors["debug"]
    start = write_hf_folder(tmp_path / "start", args, random_weights(args), eos_token_id=[3, 4])
    config = JobConfig()
    config.model.name, config.model.flavor = "delta_net", str(start)
    assert stop_tokens(config, ByteTokenizer()) == (256, 3, 4)
    config.model.flavor, config.checkpoint.initial_load_path, config.checkpoint.initial_load_in_hf = "debug", str(start), True
    assert stop_tokens(config, ByteTokenizer()) == (256, 3, 4)
    config.job.dump_folder, config.checkpoint.enable = str(tmp_path / "run"), True
    own = tmp_path / "run" / "checkpoint" / "step-7"
    own.mkdir(parents=True)
    (own / ".metadata").write_bytes(b"x")
    (start / "config.json").rename(own / "config.json")
    assert stop_tokens(config, ByteTokenizer()) == (256, 3, 4)
    assert stop_tokens(config, ByteTokenizer(), own) == (256, 3, 4) and stop_tokens(config, ByteTokenizer(), tmp_path) == (256,)


@pytest.mark.parametrize("value", ["2", 1.0, True, -1, [1, None], {"a": 1}])
def test_ids_that_are_none_are_named(tmp_path, value):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match="generation_config.json: eos_token_id is .*; allowed: a whole number from 0, a list"):
        end_of_sequence_ids(ByteTokenizer(), [tmp_path])
