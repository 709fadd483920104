"""Reports what a checkpoint folder holds, and what in it does not match its `config.json`."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from refine_titan.conversion.dcp_checksums import METADATA_FILE
from refine_titan.conversion.dcp_weights import TRAINING_STATE, DCPWeights
from refine_titan.errors import UserError
from refine_titan.models.hf_weights import INDEX_FILE, SINGLE_FILE, HFWeights
from refine_titan.models.model_config import CONFIG_FILE, ModelConfig
from refine_titan.models.stored_tensors import StoredTensor, dtype_name


@dataclass(frozen=True)
class Inspection:
    """The report on a folder.

    Attributes:
        lines: a description of its content, for people.
        problems: one line for everything that does not match its `config.json` or cannot be read.
    """

    lines: list[str]
    problems: list[str]


def inspect(folder: str | Path) -> Inspection:
    """Inspects a folder by its headers and metadata. Of the data it reads what has a checksum, and head and embeddings of a tied model, to
    compare.

    Raises:
        UserError: the folder cannot be read as a checkpoint at all.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    if (folder / METADATA_FILE).is_file():
        kind, weights = "DCP checkpoint", DCPWeights(folder)
    elif (folder / INDEX_FILE).is_file() or (folder / SINGLE_FILE).is_file():
        kind, weights = "Hugging Face checkpoint", HFWeights(folder)
    else:
        raise UserError(f"{folder} holds no checkpoint: neither {METADATA_FILE} (DCP) nor {SINGLE_FILE} nor {INDEX_FILE}")
    model, problems = "no config.json", weights.problems
    if (folder / CONFIG_FILE).is_file() or isinstance(weights, HFWeights):
        try:
            config = ModelConfig.read(folder / CONFIG_FILE)
        except UserError as error:
            model, problems = "config.json not understood", [*problems, str(error)]
        else:
            model, problems = config.family_name, weights.mismatches(config)
    if isinstance(weights, DCPWeights):
        problems = [*problems, *weights.damaged_records()]
    lines = [f"{folder}: {kind}, {model}", _summary(weights.tensors), *_table(weights.tensors)]
    if isinstance(weights, DCPWeights) and weights.training_state:
        counts = Counter(name.partition(".")[0] for name in weights.training_state)
        listed = ", ".join(f"{name} {counts[name]}" for name in TRAINING_STATE if counts[name])
        lines.append(f"training state, entries: {listed}")
    if isinstance(weights, DCPWeights):
        lines.append("checksums: compared with all data" if weights.has_checksums else "checksums: none")
    return Inspection(lines, problems)


def _summary(tensors: dict[str, StoredTensor]) -> str:
    size, nbytes = sum(tensor.size for tensor in tensors.values()), sum(tensor.nbytes for tensor in tensors.values())
    counts = Counter(dtype_name(tensor.dtype) for tensor in tensors.values())
    dtypes = ", ".join(f"{dtype}: {count}" for dtype, count in counts.items())
    return f"{size:,} parameters in {len(tensors):,} tensors, {nbytes:,} bytes ({dtypes})"


def _table(tensors: dict[str, StoredTensor]) -> list[str]:
    rows = [("tensor", "dtype", "shape", "bytes", "file")]
    rows += [(name, dtype_name(t.dtype), str(list(t.shape)), f"{t.nbytes:,}", t.file) for name, t in tensors.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join([*(row[c].ljust(widths[c]) for c in range(3)), row[3].rjust(widths[3]), row[4]]).rstrip() for row in rows]
