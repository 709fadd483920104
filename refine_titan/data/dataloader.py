"""Makes batches of packed sequences without padding. The global batch is drawn from a fixed number of streams, so
that its content does not depend on how many ranks share the streams. Legend: T tokens of a batch on one rank.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer

from refine_kernels.linear_head import IGNORE_INDEX
from refine_kernels.packing import on_device
from refine_titan.config.batch_plan import sequences_of_step
from refine_titan.config.sections import JobConfig
from refine_titan.data.documents import DocumentStream
from refine_titan.data.epochs import epoch_packers
from refine_titan.data.packing import PackedSequence, SequencePacker, packer_of
from refine_titan.data.streams import stream_opener
from refine_titan.errors import UserError
from refine_titan.models.sizes import resolve_args


@dataclass
class TokenBatch:
    """Packed sequences of one microbatch.

    Attributes:
        tokens_T: all sequences one after the other. If several ranks share the tokens, documents of one token may follow as padding.
        labels_T: the next token of the same document, -100 at the end of a document.
        cu_seqlens: where documents begin and end; no document crosses the end of a sequence.
        cu_sequences: where sequences begin and end.
        document_names: source of each document, `file:row` (and piece).
        answers: in post-training, tokens of the answer of each sequence.
        references: in post-training, texts of all correct answers of each sequence.
    """

    tokens_T: torch.Tensor
    labels_T: torch.Tensor
    cu_seqlens: tuple[int, ...]
    cu_sequences: tuple[int, ...]
    document_names: tuple[str, ...]
    answers: tuple[tuple[int, ...], ...] = ()
    references: tuple[tuple[str, ...], ...] = ()

    @property
    def num_sequences(self) -> int:
        return len(self.cu_sequences) - 1

    @property
    def num_labels(self) -> int:
        return self.tokens_T.shape[0] - (len(self.cu_seqlens) - 1)

    def documents_of_sequence(self, sequence: int) -> tuple[int, ...]:
        """`cu_seqlens` of one sequence, counted from its start."""
        start, end = self.cu_sequences[sequence : sequence + 2]
        return tuple(position - start for position in self.cu_seqlens if start <= position <= end)

    def to(self, device: torch.device) -> "TokenBatch":
        return replace(self, tokens_T=on_device(self.tokens_T, device), labels_T=on_device(self.labels_T, device))


def pack(sequences: Sequence[PackedSequence], multiple_of: int = 1, min_tokens: int = 0) -> TokenBatch:
    """Packs sequences into one microbatch.

    If several ranks share its tokens, documents of one token pad it to at least `min_tokens` and a multiple of `multiple_of`, the
    number of ranks.
    """
    tokens, cu_seqlens, cu_sequences, names = [], [0], [0], []
    for sequence in sequences:
        for part, name in sequence.documents:
            tokens.extend(part)
            cu_seqlens.append(len(tokens))
            names.append(name)
        cu_sequences.append(len(tokens))
    padded_length = -(-max(len(tokens), min_tokens) // multiple_of) * multiple_of
    while len(tokens) < padded_length:
        tokens.append(0)
        cu_seqlens.append(len(tokens))
        names.append("padding")
    tokens_T = torch.tensor(tokens, dtype=torch.long)
    labels_T = torch.full_like(tokens_T, IGNORE_INDEX)
    labels_T[:-1] = tokens_T[1:]
    labels_T[torch.tensor(cu_seqlens[1:]) - 1] = IGNORE_INDEX
    questions = [sequence.question for sequence in sequences if sequence.question is not None]
    return TokenBatch(
        tokens_T,
        labels_T,
        tuple(cu_seqlens),
        tuple(cu_sequences),
        tuple(names),
        tuple(tuple(question.answer) for question in questions),
        tuple(question.references for question in questions),
    )


class PackedDataLoader(BaseDataLoader):
    """Yields `({"batch": TokenBatch}, labels_T)` without end, as torchtitan's trainer expects.

    Sequence i of a step is the next one of stream `i mod num_streams`. Rank r of R takes sequences r, r + R, ... of the step. Because R
    divides the number of streams, these come from streams r, r + R, ..., which no other rank reads.
    """

    def __init__(
        self,
        packers: dict[int, SequencePacker],
        *,
        batch_size: int,
        num_streams: int,
        multiple_of: int = 1,
        min_tokens: int = 0,
    ):
        """Makes a loader of batches of `batch_size` sequences; `multiple_of` and `min_tokens` are those of `pack`."""
        self.packers = packers
        self.batch_size = batch_size
        self.num_streams = num_streams
        self._multiple_of, self._min_tokens = multiple_of, min_tokens
        self._sequences = 0

    @property
    def streams(self) -> list[DocumentStream]:
        """The streams of this rank."""
        return [packer.stream for packer in self.packers.values()]

    def source_description(self) -> list[str]:
        """Lines that say what `data.source` reads, and what it leaves out and why."""
        return self.streams[0].source.description()

    def __iter__(self) -> Iterator[tuple[dict[str, TokenBatch], torch.Tensor]]:
        while True:
            batch = self.next_batch()
            yield {"batch": batch}, batch.labels_T

    def next_batch(self) -> TokenBatch:
        packers, sequences = list(self.packers.values()), []
        for _ in range(self.batch_size):
            sequences.append(packers[self._sequences % len(packers)].next_sequence())
            self._sequences += 1
        return pack(sequences, self._multiple_of, self._min_tokens)

    def positions_of_last_batch(self) -> dict[str, str]:
        """The part of `state_dict` that the last batch has changed."""
        numbers = list(self.packers)
        last = {numbers[i % len(numbers)] for i in range(max(0, self._sequences - self.batch_size), self._sequences)}
        return {f"stream_{i}": self.packers[i].state() for i in last}

    def close(self) -> None:
        """Does nothing: files are closed when they are read to their end or forgotten."""

    # Between steps every stream has given equally many sequences, so the positions of the streams are the whole state.
    def state_dict(self) -> dict[str, Any]:
        return {f"stream_{i}": packer.state() for i, packer in self.packers.items()} | {"num_streams": self.num_streams}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        if state_dict["num_streams"] != self.num_streams:
            raise UserError(
                f"the checkpoint's data position is of {state_dict['num_streams']} streams, this run has {self.num_streams}; pass "
                f"--data.num_streams {state_dict['num_streams']}, or --checkpoint.exclude_from_loading dataloader to start from the "
                "beginning of the data"
            )
        for i, packer in self.packers.items():
            packer.load_state(state_dict[f"stream_{i}"])
        self._sequences = 0


@dataclass
class DataProgress:
    """What a rank's streams have read, taken from a data position.

    Attributes:
        streams, num_streams: number of streams of this rank, and of all.
        passes: whole passes that all streams of this rank have made over the source.
        documents_read, skipped, cut: counts of the first pass; skipped documents by reason, cut texts by what was cut.
    """

    streams: int
    num_streams: int
    passes: int
    documents_read: int
    skipped: Counter[str]
    cut: Counter[str]

    @classmethod
    def at(cls, position: dict[str, Any]) -> "DataProgress":
        """Reads the counts from the `state_dict` of a dataloader."""
        streams = [json.loads(text)["stream"] for name, text in position.items() if name.startswith("stream_")]
        skipped, cut = Counter(), Counter()
        for stream in streams:
            skipped.update(stream["skipped"])
            cut.update(stream.get("cut", {}))
        return cls(
            len(streams),
            position["num_streams"],
            min(stream["epoch"] for stream in streams),
            sum(stream["documents_read"] for stream in streams),
            skipped,
            cut,
        )


def build_dataloader(dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig, **_) -> PackedDataLoader:
    """Builds this rank's dataloader for `[data]`, which works in this process.

    Raises:
        UserError: the source cannot be read.
    """
    training = job_config.training
    num_streams = job_config.data.num_streams or dp_world_size
    numbers = range(dp_rank, num_streams, dp_world_size)
    open_stream = stream_opener(job_config, tokenizer)
    if training.epochs:
        sequences = sequences_of_step(job_config, dp_world_size)
        packers = epoch_packers(job_config, open_stream(0, 1), numbers, num_streams, sequences)
    else:
        packers = {i: packer_of(open_stream(i, num_streams), training.seq_len) for i in numbers}
    ranks, shortest = context_shards(job_config) if job_config.refine.phase == "posttrain" else (1, 0)
    return PackedDataLoader(
        packers, batch_size=training.local_batch_size, num_streams=num_streams, multiple_of=ranks, min_tokens=ranks * shortest
    )


def context_shards(config: JobConfig) -> tuple[int, int]:
    """Number of ranks that share the tokens of a microbatch, and the fewest tokens that each must have."""
    degree = config.parallelism.context_parallel_degree
    if degree == 1:
        return 1, 0
    args = resolve_args(config.model)
    return degree, max(args.reach(), config.refine.rollout_length)
