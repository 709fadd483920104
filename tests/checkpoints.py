"""Checkpoint folders that tests make, and their comparison bit by bit."""

import json
import math
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from refine_titan.conversion.from_hf import from_hf
from refine_titan.conversion.to_hf import to_hf
from refine_titan.models.decoder import DecoderArgs
from refine_titan.models.model_config import empty_state_dict
from refine_titan.models.state_dict_adapter import DecoderStateDictAdapter
from refine_titan.models.stored_tensors import same_bits
from tests.here import command_here

TOOL = Path(__file__).parents[1] / "tools" / "convert_checkpoint.py"
INDEX = "model.safetensors.index.json"


def convert(*arguments) -> subprocess.CompletedProcess:
    """The command line, in a process of its own."""
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def convert_here(*arguments) -> subprocess.CompletedProcess:
    """The command line, in this process."""
    return command_here("convert", *arguments)


def random_weights(args: DecoderArgs, dtype=torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights under Hugging Face's names, as small as initial ones."""
    generator = torch.Generator().manual_seed(seed)
    expected = DecoderStateDictAdapter(args).to_hf(empty_state_dict(args))
    return {name: (0.02 * torch.randn(t.shape, generator=generator)).to(dtype) for name, t in expected.items()}


def random_bits(args: DecoderArgs, dtype=torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of any bits, NaNs and infinities included."""
    generator = torch.Generator().manual_seed(seed)
    expected = DecoderStateDictAdapter(args).to_hf(empty_state_dict(args))

    def bits(shape: torch.Size) -> torch.Tensor:
        nbytes = shape.numel() * dtype.itemsize
        return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)

    return {name: bits(tensor.shape) for name, tensor in expected.items()}


def write_hf_folder(folder: Path, args: DecoderArgs, weights: dict[str, torch.Tensor], shard_of=None, **config) -> Path:
    """A Hugging Face folder; `shard_of` gives the shard of each tensor, None makes a single file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(args.to_hf_config() | config))
    if shard_of is None:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {name: f"part-{shard_of(name)}.safetensors" for name in weights}
    for file in set(weight_map.values()):
        save_file({name: weights[name] for name in weights if weight_map[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def export(folder: Path, args: DecoderArgs, weights: dict[str, torch.Tensor], **options) -> Path:
    """The Hugging Face folder that comes of weights by way of DCP; `options` are those of `to_hf`."""
    write_hf_folder(folder / "hf", args, weights)
    from_hf(folder / "hf", folder / "dcp")
    to_hf(folder / "dcp", folder / "exported", **options)
    return folder / "exported"


def read_hf_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder, by the index if there is one."""
    if not (folder / INDEX).is_file():
        return load_file(folder / "model.safetensors")
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    shards = {file: load_file(folder / file) for file in set(weight_map.values())}
    assert sorted(name for shard in shards.values() for name in shard) == sorted(weight_map)
    return {name: shards[file][name] for name, file in weight_map.items()}


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], expected[name]) for name in expected)


def assert_nothing_left(out: Path) -> None:
    """Neither the output nor an unfinished one."""
    assert not out.exists()
    assert [path.name for path in out.parent.iterdir() if path.name.endswith(".partial")] == []


def write_full_size_start(folder: Path, args: DecoderArgs) -> Path:
    """A Hugging Face folder with `config.json`, a tokenizer of the model's vocabulary, and weights in bfloat16 that are a hole in
    the file: any size takes a few KiB of disk."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(args.to_hf_config()))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(args.vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    header, offset = {}, 0
    for name, tensor in DecoderStateDictAdapter(args).to_hf(empty_state_dict(args)).items():
        end = offset + 2 * math.prod(tensor.shape)
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + offset)
    return folder
