"""Reads the model's part of a DCP checkpoint: all metadata at once, tensors one by one."""

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from refine_titan.conversion.dcp_metadata import CHECKING_THREADS, READING_ERRORS, CheckedReader, DamagedCheckpoint, data_file_problems
from refine_titan.errors import UserError
from refine_titan.models.decoder import DecoderArgs
from refine_titan.models.model_config import ModelConfig
from refine_titan.models.stored_tensors import StoredTensor, first_of, mismatches, same_bits, sha256_of_tensors

# First parts of the names of entries that torchtitan's checkpoints hold besides the model.
TRAINING_STATE = ("optimizer", "lr_scheduler", "dataloader", "train_state")


class DCPWeights:
    """The model's tensors in a checkpoint folder.

    Attributes:
        folder: the folder.
        reader: reads and compares its records.
        metadata: content of `.metadata`.
        tensors: dtype, shape and file of each tensor of the model, under our names.
        training_state: names of the entries that belong to training.
        problems: one line for each data file that is missing or too short, and for each entry that is not a tensor.
    """

    def __init__(self, folder: str | Path):
        """Reads the metadata.

        Raises:
            UserError: the metadata cannot be read.
        """
        self.folder = Path(folder)
        self.reader = CheckedReader(self.folder)
        self.tensors: dict[str, StoredTensor] = {}
        self.training_state: list[str] = []
        self.problems: list[str] = []
        metadata = self.metadata = self.reader.read_metadata()
        files: dict[str, list[str]] = {}
        for index, stored in metadata.storage_data.items():
            files.setdefault(index.fqn, []).append(stored.relative_path)
        for name, entry in metadata.state_dict_metadata.items():
            if name.partition(".")[0] in TRAINING_STATE:
                self.training_state.append(name)
            elif isinstance(entry, TensorStorageMetadata):
                file = ", ".join(dict.fromkeys(files.get(name, ())))
                self.tensors[name] = StoredTensor(entry.properties.dtype, tuple(entry.size), file)
            else:
                self.problems.append(f"{name} is not a tensor, nor known as part of a training run's state")
        self.problems += data_file_problems(self.folder, metadata, self.tensors)

    def read(self, name: str) -> torch.Tensor:
        """Reads one whole tensor, however many ranks wrote it.

        Raises:
            UserError: the tensor cannot be read.
        """
        stored = self.tensors[name]
        target = {name: torch.empty(stored.shape, dtype=stored.dtype)}
        try:
            call_dcp(dcp.load, target, storage_reader=self.reader)
        except UserError:
            raise
        except READING_ERRORS as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(f"{self.folder}: {name} cannot be read from {stored.file}: {reason}") from error
        return target[name]

    def sha256(self, dtype: torch.dtype) -> str:
        """The digest of the weights in a precision, by which an evaluation says which weights it was of."""
        return sha256_of_tensors((name, self.read(name).to(dtype)) for name in sorted(self.tensors))

    @property
    def has_checksums(self) -> bool:
        return self.reader.has_checksums

    def damaged_records(self) -> list[str]:
        """One line for each record whose checksum is not that of what was written, those of training state included; reads all data, in
        several threads."""
        if not self.has_checksums or self.problems:
            return []

        def problem(index: MetadataIndex) -> str | None:
            try:
                self.reader.check_record(index)
            except DamagedCheckpoint as error:
                return error.problem
            return None

        with ThreadPoolExecutor(CHECKING_THREADS) as pool:
            return [found for found in pool.map(problem, self.metadata.storage_data) if found is not None]

    def mismatches(self, config: ModelConfig) -> list[str]:
        """One line for each difference between these weights and what the model needs."""
        return self.mismatches_with(config.args, config.tensors, config.source)

    def mismatches_with(self, args: DecoderArgs, expected: Mapping[str, torch.Tensor], source: str) -> list[str]:
        """One line for each difference between these weights and what a model of these sizes needs, whose state dict is `expected` and
        which `source` describes. Of a tied model head and embeddings are read and compared."""
        lines = [*self.problems, *mismatches(self.tensors, expected, source)]
        head, embeddings = "output.weight", "tok_embeddings.weight"
        if not lines and args.tie_word_embeddings and not same_bits(self.read(head), self.read(embeddings)):
            lines = [f"{head} differs from {embeddings}, but {source} ties them (tie_word_embeddings)"]
        return lines

    def check(self, config: ModelConfig) -> None:
        """Raises UserError, which names a tensor or file, unless these are the weights of the model."""
        problems = self.mismatches(config)
        if problems:
            raise UserError(f"{self.folder}: {first_of(problems)}")


def call_dcp(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls `dcp.save` or `dcp.load` in this process alone, and raises the original exception if one occurs.

    DCP wraps every exception, KeyboardInterrupt included, in a CheckpointException, which is no Exception and has a traceback as text.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            return function(*args, no_dist=True, **kwargs)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
    # An interrupt in the middle of a file makes torch.save fail over the half-written file.
    behind: BaseException | None = cause
    while behind is not None and not isinstance(behind, KeyboardInterrupt):
        behind = behind.__cause__ or behind.__context__
    raise behind or cause  # outside the handler, which would replace the context of the cause
