"""Whole epochs: every document exactly once in each, in an order drawn over all of them (`training.epochs`).

The lengths of all documents are found once, before the first step, and kept in the run's folder. From then on sequence i of the run is a
function of them, the seed and i: its tokens are i * seq_len to (i + 1) * seq_len of all epochs, one after the other. The position in the
data is a number, and sequences do not depend on how many ranks there are.
Legend: n documents (pieces of split ones count as documents).
"""

import io
import json
import logging
import zipfile
import zlib
from array import array
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from refine_titan.config.sections import JobConfig
from refine_titan.data.documents import Document, DocumentAddress, DocumentStream
from refine_titan.data.packing import PackedSequence, SequencePacker
from refine_titan.data.questions import QuestionDocument, QuestionStream
from refine_titan.data.streams import stream_opener
from refine_titan.data.tokenizer import build_tokenizer
from refine_titan.errors import UserError
from refine_titan.files.reasons import one_line
from refine_titan.files.whole_files import write_atomically
from refine_titan.rank_messages import rank_0_first
from refine_titan.seeding import derive_seed

# torchtitan's logger too.
logger = logging.getLogger()

INDEX_FILE = "documents.npz"
# How a run of epochs goes on with other data, or with steps of another size: its steps count from the beginning of the data.
ANOTHER_RUN = "begin another run from the checkpoint: another job.dump_folder, and checkpoint.initial_load_path"


@dataclass(frozen=True)
class DocumentIndex:
    """Where all documents of a source are, and how long.

    Attributes:
        addresses_n3: file, row and piece of each.
        lengths_n: tokens of each; 1 for a question, of which a sequence holds one.
        counts: what a pass over the source has read, skipped and cut, as in a stream's state.
    """

    addresses_n3: np.ndarray
    lengths_n: np.ndarray
    counts: dict[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Tokens of an epoch; of questions their number."""
        return int(self.lengths_n.sum())

    @classmethod
    def of(cls, stream: DocumentStream) -> "DocumentIndex":
        """Reads and tokenizes all documents of a stream that is the only one of its source.

        Raises:
            UserError: there are none.
        """
        addresses, lengths = array("q"), array("q")  # 32 bytes a document
        one_each = isinstance(stream, QuestionStream)
        for document in stream.documents_of_pass():
            addresses.extend(document.address)
            lengths.append(1 if one_each else len(document.tokens))
        counts = {name: value for name, value in stream.state_dict().items() if name in ("documents_read", "skipped", "cut")}
        return cls(np.asarray(addresses, dtype=np.int64).reshape(-1, 3), np.asarray(lengths, dtype=np.int64), counts)


def open_index(config: JobConfig, stream: DocumentStream, keep: bool) -> DocumentIndex:
    """The index of a run's data: that of the run's folder if it is of these data, else it is made, and kept there.

    Args:
        keep: whether it is written.

    Raises:
        UserError: the documents cannot be read in any order, or there are none.
    """
    reason = stream.source.why_in_order()
    if reason is not None:
        raise UserError(
            f"training.epochs is {config.training.epochs}, which reads documents in any order, but data.source {reason}; allowed: "
            "training.steps, files that are not compressed, or data that refine-titan prepare has prepared"
        )
    path, identity = Path(config.job.dump_folder, INDEX_FILE), json.dumps(stream.identity, sort_keys=True)
    index = _last.get(identity) or _read(path, identity)
    if index is None:
        logger.info("training.epochs: reading all documents once, to know how long they are")
        index = DocumentIndex.of(stream)
        if keep:
            _keep(path, index, identity)
    _last.clear()
    _last[identity] = index
    return index


# The index that this process has opened last, by the identity of its data: steps are counted, then batches are made.
_last: dict[str, DocumentIndex] = {}


def _keep(path: Path, index: DocumentIndex, identity: str) -> None:
    content = io.BytesIO()
    about = np.frombuffer(json.dumps({"identity": identity, "counts": index.counts}).encode(), dtype=np.uint8)
    np.savez_compressed(content, addresses=index.addresses_n3, lengths=index.lengths_n, about=about)
    write_atomically(path, [content.getvalue()])


def _read(path: Path, identity: str) -> DocumentIndex | None:
    """The index in a file; None if there is none, or it is damaged or of other data: then it is made again."""
    try:
        with np.load(path, allow_pickle=False) as found:
            about = json.loads(found["about"].tobytes())
            index = DocumentIndex(found["addresses"], found["lengths"], about["counts"])
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, LookupError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        logger.warning(f"{path} cannot be read and is made again ({one_line(error)})")
        return None
    return index if about["identity"] == identity else None


class EpochOrder:
    """The order of all documents in every epoch."""

    def __init__(self, index: DocumentIndex, seed: int):
        self.index, self._seed = index, seed
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def parts(self, first: int, count: int) -> list[tuple[int, int, int]]:
        """The documents that hold the tokens `first` to `first + count` of all epochs: number, first token in it, tokens of it."""
        found = []
        while count:
            epoch, token = divmod(first, self.index.total)
            order_n, ends_n = self._of_epoch(epoch)
            place = int(np.searchsorted(ends_n, token, side="right"))
            number = int(order_n[place])
            begin = token - (int(ends_n[place]) - int(self.index.lengths_n[number]))
            size = min(count, int(ends_n[place]) - token)
            found.append((number, begin, size))
            first, count = first + size, count - size
        return found

    def _of_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents in the order of an epoch, and the number of tokens up to the end of each."""
        if self._epoch is None or self._epoch[0] != epoch:
            order_n = shuffled(len(self.index.lengths_n), derive_seed(self._seed, "epoch", epoch))
            self._epoch = epoch, order_n, np.cumsum(self.index.lengths_n[order_n])
        return self._epoch[1:]


def shuffled(count: int, seed: int) -> np.ndarray:
    """The numbers below `count` in an order that depends on the seed alone, whatever version of numpy draws: sorted by SplitMix64."""
    with np.errstate(over="ignore"):
        keys = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
    return np.argsort(keys ^ (keys >> np.uint64(31)), kind="stable")


class EpochPacker(SequencePacker):
    """Sequences `number`, `number` + `num_streams`, ... of all epochs."""

    def __init__(self, stream: DocumentStream, order: EpochOrder, seq_len: int, number: int, num_streams: int, step_sequences: int):
        """
        Args:
            stream: one of the whole source; it reads documents by their addresses.
            step_sequences: sequences of a step over all ranks, which a run keeps: a step's number says how many were read.
        """
        super().__init__(stream, seq_len)
        self._order, self._number, self._num_streams, self._sequence = order, number, num_streams, number
        self._step_sequences, self._holds_questions = step_sequences, isinstance(stream, QuestionStream)

    def next_sequence(self) -> PackedSequence:
        size = 1 if self._holds_questions else self.seq_len
        parts = self._order.parts(self._sequence * size, size)
        addresses = [DocumentAddress(*map(int, self._order.index.addresses_n3[number])) for number, _, _ in parts]
        documents = self.stream.documents_at(addresses)
        self._sequence += self._num_streams
        if self._holds_questions:
            [document] = documents
            return PackedSequence([(document.tokens, self._name(document.address, 0))], self._question(document))
        pieces = zip(documents, parts)
        return PackedSequence([(d.tokens[begin : begin + size], self._name(d.address, begin)) for d, (_, begin, size) in pieces])

    @staticmethod
    def _question(document: Document):
        assert isinstance(document, QuestionDocument)
        return document.question

    def state(self) -> str:
        size = 1 if self._holds_questions else self.seq_len
        counts = self._order.index.counts
        if self._number:  # what the one pass over the source has found is told once
            counts = {"documents_read": 0, "skipped": {}}
        stream = {"identity": self.stream.identity, "epoch": self._sequence * size // self._order.index.total, **counts}
        return json.dumps({"stream": stream, "sequence": self._sequence, "step_sequences": self._step_sequences})

    def load_state(self, text: str) -> None:
        state = json.loads(text)
        if "sequence" not in state:
            raise UserError(
                "training.epochs is set, but the checkpoint's run counted steps, in which documents have another order; leave it out, or "
                f"{ANOTHER_RUN}"
            )
        self.stream.check_identity(state["stream"], ANOTHER_RUN)
        before = state.get("step_sequences", self._step_sequences)  # positions of earlier versions lack it
        if before != self._step_sequences:
            raise UserError(
                f"training.global_batch_size gives a step {self._step_sequences} sequences, but {before} when the checkpoint was written, "
                f"and with training.epochs the number of a step says how many were read; allowed: --training.global_batch_size {before}. "
                f"Or {ANOTHER_RUN}"
            )
        self._sequence = state["sequence"]


def epoch_packers(
    config: JobConfig, stream: DocumentStream, numbers: range, num_streams: int, step_sequences: int
) -> dict[int, SequencePacker]:
    """The packers of a rank's streams, by number; `stream` is one of the whole source, `step_sequences` as in `EpochPacker`.

    Raises:
        UserError: the documents cannot be read in any order, or there are none.
    """
    order = EpochOrder(open_index(config, stream, keep=False), config.debug.seed)  # `with_steps` has kept it
    return {i: EpochPacker(stream, order, config.training.seq_len, i, num_streams, step_sequences) for i in numbers}


def with_steps(config: JobConfig, sequences: int, keep: bool = True) -> JobConfig:
    """The settings with the number of steps that `training.epochs` takes; the last ones of fewer sequences than a step has are left out.

    Of the ranks of a run, rank 0 makes the index and keeps it, then the others read it: in the run's folder only rank 0 writes.

    Args:
        sequences: sequences of a step over all ranks.
        keep: whether the run's folder may be written; if not, this process works alone.

    Raises:
        UserError: the epochs are shorter than a step, or longer than the schedule.
        LostRankError: rank 0 is gone.
    """
    epochs = config.training.epochs
    if not epochs:
        return config
    stream = stream_opener(config, build_tokenizer(config))(0, 1)
    if keep:
        index = rank_0_first("documents", "reads all documents", lambda is_first: open_index(config, stream, is_first))
    else:
        index = open_index(config, stream, keep)
    size, unit = (1, "questions") if isinstance(stream, QuestionStream) else (config.training.seq_len, "tokens")
    steps = epochs * index.total // (size * sequences)
    if not steps:
        raise UserError(
            f"training.epochs is {epochs}: {epochs * index.total:,} {unit} in all, but a step takes {size * sequences:,}; allowed: more "
            "data, more epochs, or a smaller training.global_batch_size"
        )
    total = config.lr_scheduler.total_steps
    if total is not None and total < steps:
        raise UserError(f"lr_scheduler.total_steps is {total}; allowed: at least {steps}, the steps of {epochs} epoch(s), or not set")
    documents = f"{len(index.lengths_n):,} documents with " if unit == "tokens" else ""
    logger.info(f"training.epochs: {documents}{index.total:,} {unit} in an epoch, {steps:,} steps in {epochs} epoch(s)")
    return replace(config, training=replace(config.training, steps=steps))
