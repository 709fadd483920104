"""Converts a DCP checkpoint to a Hugging Face folder."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from refine_titan.conversion.byte_tokenizer import byte_tokenizer_files
from refine_titan.conversion.carried import CarriedTensors
from refine_titan.conversion.dcp_weights import DCPWeights
from refine_titan.conversion.description import ModelDescription, find_assets, has_tokenizer, json_bytes, stated_dtype, with_dtype
from refine_titan.conversion.output_folder import new_folder
from refine_titan.errors import UserError
from refine_titan.models.hf_files import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, TOKENIZER_PARTS
from refine_titan.models.hf_weights import INDEX_FILE, SINGLE_FILE
from refine_titan.models.model_config import CONFIG_FILE, ModelConfig
from refine_titan.models.stored_tensors import dtype_name
from refine_titan.progress import Progress

DEFAULT_SHARD_BYTES = 10**9
# In place of a tokenizer's folder.
BYTES = "bytes"


@dataclass(frozen=True)
class _Entry:
    """A tensor to write: our names of its parts (none if it is beside the model), its Hugging Face name, and its dtype and bytes there."""

    ours: tuple[str, ...]
    theirs: str
    dtype: torch.dtype
    nbytes: int


def to_hf(
    dcp_folder: str | Path,
    out: str | Path,
    config_path: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    tokenizer: str | Path | None = None,
) -> list[str]:
    """Writes safetensors weights (with an index and shards if one file is too small), `config.json` and the tokenizer's files.

    transformers' AutoTokenizer and vLLM find in them all that they need.

    Args:
        dcp_folder: a checkpoint of a run, whose training state is not written, or one that `from_hf` wrote.
        out: the folder to make.
        config_path: a `config.json` that describes the model; by default the checkpoint's own. The tokenizer's files are the
            checkpoint's, or, if it has none, those beside this file.
        dtype: dtype of the weights; by default as stored. A family may keep some in float32 (`keep_in_float32`).
        max_shard_bytes: size of a shard; one shard is in memory at a time.
        tokenizer: a folder with a tokenizer, or BYTES for the one of bytes, in place of the checkpoint's.

    Returns:
        Notes for the user.

    Raises:
        UserError: the checkpoint is not complete or not of this model, or `out` cannot be written.
    """
    dcp_folder = Path(dcp_folder)
    weights = DCPWeights(dcp_folder)
    if config_path is None and not (dcp_folder / CONFIG_FILE).is_file():
        raise UserError(f"{dcp_folder} has no {CONFIG_FILE}; name the model's with --config")
    config = ModelConfig.read(config_path or dcp_folder / CONFIG_FILE)
    weights.check(config)
    carried = CarriedTensors.of_dcp(dcp_folder)
    entries = _entries(config, weights, dtype)
    if carried is not None:
        entries += [_Entry((), name, stored.dtype, stored.nbytes) for name, stored in carried.tensors.items()]
    assets, made = _tokenizer_files([dcp_folder, config.path.parent], tokenizer)
    description = ModelDescription(with_dtype(config.raw, dtype) if dtype else config.raw, assets, made=made)
    nbytes = sum(entry.nbytes for entry in entries)
    shards = _shards(entries, max_shard_bytes)
    names = _file_names(len(shards))
    overflows = []
    with new_folder(Path(out), nbytes + description.nbytes + 512 * len(entries), dcp_folder) as folder:
        description.write(folder)
        with Progress("to-hf", nbytes, "bytes") as progress:
            for name, shard in zip(names, shards):
                tensors = {}
                for entry in shard:
                    if not entry.ours:
                        tensors[entry.theirs] = carried.read(entry.theirs)
                        progress.advance(entry.nbytes)
                        continue
                    parts = {}
                    for ours in entry.ours:
                        stored = weights.read(ours)
                        parts[ours] = stored.to(entry.dtype)
                        if entry.dtype != stored.dtype and not torch.equal(parts[ours].isfinite(), stored.isfinite()):
                            overflows.append(entry.theirs)
                    tensors |= config.adapter.to_hf(parts)
                    progress.advance(entry.nbytes)
                save_file(tensors, folder / name, metadata={"format": "pt"})
                shutil.copymode(folder / CONFIG_FILE, folder / name)  # safetensors 0.8.0 makes files that only their owner may read
        if len(shards) > 1:
            weight_map = {entry.theirs: name for name, shard in zip(names, shards) for entry in shard}
            index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
            (folder / INDEX_FILE).write_bytes(json_bytes(index))
    notes = _notes(description, [entry for entry in entries if entry.ours], overflows)
    if config.args.is_part_of_larger and carried is None:
        notes.append("the checkpoint has no tensors beside the model's, such as those of a vision tower, which config.json speaks of")
    return notes


def _tokenizer_files(folders: list[Path], named: str | Path | None) -> tuple[tuple[Path, ...], dict[str, bytes]]:
    """The files to copy, and those to make: AutoTokenizer looks up the class in `tokenizer_config.json`, and without it knows no family
    of ours."""
    if named == BYTES:
        return (), byte_tokenizer_files()
    if named is not None:
        folders = [Path(named)]
        if not has_tokenizer(folders[0]):
            raise UserError(f"--tokenizer is {str(named)!r}, which has no tokenizer; allowed: a folder with {TOKENIZER_FILE}, or {BYTES!r}")
    assets = next((found for folder in folders if (found := find_assets(folder))), ())
    names = {path.name for path in assets}
    if TOKENIZER_CONFIG_FILE in names or not names & {TOKENIZER_FILE, *TOKENIZER_PARTS}:
        return assets, {}
    kind = "PreTrainedTokenizerFast" if TOKENIZER_FILE in names else "GPT2Tokenizer"
    return assets, {TOKENIZER_CONFIG_FILE: json_bytes({"tokenizer_class": kind})}


def _notes(description: ModelDescription, entries: list[_Entry], overflows: list[str]) -> list[str]:
    notes = []
    if overflows:
        notes.append(f"values too large for the new dtype became infinite in {', '.join(overflows)}")
    if not {TOKENIZER_FILE, *TOKENIZER_PARTS} & {*description.made, *(path.name for path in description.assets)}:
        notes.append("the checkpoint has no tokenizer, so that the folder has none; --tokenizer names one")
    stated, written = stated_dtype(description.config), {dtype_name(entry.dtype) for entry in entries}
    if stated is not None and stated not in written:
        written_names = ", ".join(written)
        notes.append(f"the weights are {written_names}, but config.json says {stated}, to which transformers casts them on loading")
    return notes


def _entries(config: ModelConfig, weights: DCPWeights, dtype: torch.dtype | None) -> list[_Entry]:
    kept = config.args.hf_format.keep_in_float32
    entries = []
    for theirs, tensor in config.adapter.to_hf(config.tensors).items():
        ours = config.adapter.our_names(theirs)
        target = dtype or weights.tensors[ours[0]].dtype
        if dtype is not None and ours[0].endswith(kept):
            target = torch.float32
        entries.append(_Entry(ours, theirs, target, tensor.numel() * target.itemsize))
    return entries


def _shards(entries: list[_Entry], max_bytes: int) -> list[list[_Entry]]:
    """Groups consecutive entries into shards of at most `max_bytes`; a larger entry is a shard of its own."""
    shards: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _file_names(count: int) -> list[str]:
    return [SINGLE_FILE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
