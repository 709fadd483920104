"""The safetensors weights of a Hugging Face folder, in one file or in shards. Headers are read at once, tensors one by one."""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from refine_titan.errors import UserError
from refine_titan.files.git_lfs import refuse_lfs_pointer
from refine_titan.models.early_layouts import split_gates
from refine_titan.models.model_config import ModelConfig, read_json
from refine_titan.models.stored_tensors import StoredTensor, first_of, mismatches, same_bits

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class HFWeights:
    """The weights in a folder.

    Attributes:
        folder: where they are.
        tensors: what the headers say of each tensor, under the names that Hugging Face's libraries have today.
        problems: files that are missing or damaged, and contradictions between index and shards; one line each.
    """

    def __init__(self, folder: str | Path):
        """Reads the index and the headers.

        Raises:
            UserError: if there are no weights, two sets of them, or their index cannot be read.
        """
        self.folder = Path(folder)
        self.tensors: dict[str, StoredTensor] = {}
        self.problems: list[str] = []
        self._lost: set[str] = set()
        if (self.folder / INDEX_FILE).is_file():
            weight_map = read_weight_map(self.folder / INDEX_FILE)
            if (self.folder / SINGLE_FILE).is_file() and SINGLE_FILE not in weight_map.values():
                raise UserError(f"{self.folder} holds two sets of weights, {SINGLE_FILE} and {INDEX_FILE}; remove one")
            self._read_shards(weight_map)
        else:
            self._read_single_file()
        self.tensors, self._rows = split_gates(self.tensors)

    @property
    def is_early(self) -> bool:
        """Whether tensors have a layout of earlier versions of flash-linear-attention."""
        return bool(self._rows)

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor into memory of its own: the file is mapped, and a mapped page counts as resident until the file is closed.

        Raises:
            UserError: if the file cannot be read.
        """
        path = self.folder / self.tensors[name].file
        try:
            with safe_open(path, framework="pt") as file:
                if name in self._rows:
                    whole, first, end = self._rows[name]
                    return file.get_slice(whole)[first:end].clone()
                return file.get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: {name} cannot be read: {error}") from error

    def carried(self, config: ModelConfig) -> dict[str, StoredTensor]:
        """Tensors that are beside the model."""
        beginnings = config.args.hf_format.carried
        return {name: tensor for name, tensor in self.tensors.items() if beginnings and name.startswith(beginnings)}

    def unread(self, config: ModelConfig) -> list[str]:
        """Names of tensors of earlier versions of the model's library, which no code reads any more."""
        return [name for name in self.tensors if config.adapter.is_unread(name)]

    def notes(self, config: ModelConfig) -> list[str]:
        """Says, for the user, what in these weights is not trained or not used."""
        unread = self.unread(config)
        if not unread:
            return []
        more = f" and {len(unread) - 1} more of its kind" if len(unread) > 1 else ""
        return [f"{unread[0]}{more}: written by an earlier version of the model's library, which reads it no more; left out"]

    def mismatches(self, config: ModelConfig) -> list[str]:
        """Lists everything that keeps these weights from being those of the model, one line each.

        The head of a model with tied embeddings may be stored too, if it is bitwise the same as the embeddings.
        """
        adapter = config.adapter
        expected = adapter.to_hf(config.tensors)
        aside = {*self.carried(config), *self.unread(config)}
        found = {name: tensor for name, tensor in self.tensors.items() if name not in aside}
        head, embeddings = adapter.hf_name("output.weight"), adapter.hf_name("tok_embeddings.weight")
        tied = []
        if head in found and head not in expected:
            found = {name: tensor for name, tensor in found.items() if name != head}
            if embeddings in found and not same_bits(self.read(head), self.read(embeddings)):
                tied = [f"{head} differs from {embeddings}, but {config.source} ties them (tie_word_embeddings)"]
        # Tensors of a missing shard are reported with the shard.
        readable = {name: tensor for name, tensor in expected.items() if name not in self._lost}
        return [*self.problems, *mismatches(found, readable, config.source), *tied]

    def check(self, config: ModelConfig) -> None:
        """Checks that these are the weights of the model.

        Raises:
            UserError: naming a tensor or file.
        """
        problems = self.mismatches(config)
        if problems:
            raise UserError(f"{self.folder}: {first_of(problems)}")

    def _read_single_file(self) -> None:
        path = self.folder / SINGLE_FILE
        if not path.is_file():
            raise UserError(f"{path} does not exist, nor does {INDEX_FILE}")
        self.tensors = read_header(path)

    def _read_shards(self, weight_map: dict[str, str]) -> None:
        strays = []
        for shard in dict.fromkeys(weight_map.values()):
            named = [name for name, file in weight_map.items() if file == shard]
            try:
                stored = read_header(self.folder / shard)
            except UserError as error:
                reason = str(error).removeprefix(f"{self.folder}/")
                self.problems.append(f"{reason}; {INDEX_FILE} says that it holds {named[0]}")
                self._lost.update(named)
                continue
            for name in named:
                if name in stored:
                    self.tensors[name] = stored[name]
                else:
                    self.problems.append(f"{shard} lacks {name}, which {INDEX_FILE} says it holds")
                    self._lost.add(name)
            unnamed = [name for name in stored if weight_map.get(name) != shard]
            strays += [f"{shard} holds {name}, which {INDEX_FILE} does not say" for name in unnamed]
        self.problems += strays


def read_weight_map(path: Path) -> dict[str, str]:
    """Reads from the index of a folder in which file each tensor is.

    Raises:
        UserError: if it cannot be read, or names files elsewhere.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: weight_map is {str(weight_map)[:40]}; expected names of tensors and their files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{path}: weight_map says that {name} is in {file!r}; expected the name of a file in this folder")
    return weight_map


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Reads what the header of a safetensors file says of each tensor.

    Raises:
        UserError: if it cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    tensors = {}
    try:
        refuse_lfs_pointer(path)
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                header = file.get_slice(name)
                if header.get_dtype() not in DTYPES:
                    raise UserError(f"{path}: {name} has dtype {header.get_dtype()}; known: {', '.join(DTYPES)}")
                tensors[name] = StoredTensor(DTYPES[header.get_dtype()], tuple(header.get_shape()), path.name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from error
    return tensors


def is_weights_file(name: str) -> bool:
    """Whether an export may give this name to a file of weights, or to their index."""
    return name in (SINGLE_FILE, INDEX_FILE) or _SHARD.fullmatch(name) is not None
