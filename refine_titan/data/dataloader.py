"""Packs documents into batches without padding.

A sequence is a row of exactly `training.seq_len` tokens; a document that does not fit goes on in the next row of its stream,
as a document of its own. The global batch is dealt out from a fixed number of streams, so that its content does not depend
on how many ranks share the streams. Legend: T tokens of a batch on one rank.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer

from refine_kernels.linear_head import IGNORE_INDEX
from refine_titan.data.documents import Document, DocumentAddress, DocumentStream
from refine_titan.data.sources import build_source
from refine_titan.errors import UserError
from refine_titan.job_config import JobConfig


@dataclass
class TokenBatch:
    """Packed sequences of one microbatch.

    Attributes:
        tokens_T: all rows one after the other.
        labels_T: the next token of the same document, -100 at a document's end.
        cu_seqlens: where documents begin and end; no document crosses a row.
        seq_len: tokens of a row; T is a multiple of it.
        document_names: source of each document, `file:row` (and piece).
    """

    tokens_T: torch.Tensor
    labels_T: torch.Tensor
    cu_seqlens: tuple[int, ...]
    seq_len: int
    document_names: tuple[str, ...]

    @property
    def num_sequences(self) -> int:
        return self.tokens_T.shape[0] // self.seq_len

    @property
    def num_labels(self) -> int:
        return self.tokens_T.shape[0] - (len(self.cu_seqlens) - 1)

    def documents_of_sequence(self, sequence: int) -> tuple[int, ...]:
        """`cu_seqlens` of one row, counted from the row's start."""
        start, end = sequence * self.seq_len, (sequence + 1) * self.seq_len
        return tuple(position - start for position in self.cu_seqlens if start <= position <= end)

    def to(self, device: torch.device) -> "TokenBatch":
        return TokenBatch(
            self.tokens_T.to(device), self.labels_T.to(device), self.cu_seqlens, self.seq_len, self.document_names
        )


class SequencePacker:
    """Cuts one stream of documents into sequences of `seq_len` tokens."""

    def __init__(self, stream: DocumentStream, seq_len: int):
        self.stream = stream
        self.seq_len = seq_len
        self._rest: Document | None = None
        self._rest_offset = 0

    def next_sequence(self) -> list[tuple[list[int], str]]:
        """Tokens and name of each document in the next sequence."""
        documents, room = [], self.seq_len
        while room:
            if self._rest is None:
                self._rest, self._rest_offset = self.stream.next_document(), 0
            part = self._rest.tokens[self._rest_offset : self._rest_offset + room]
            documents.append((part, self._name(self._rest.address, self._rest_offset)))
            room -= len(part)
            self._rest_offset += len(part)
            if self._rest_offset == len(self._rest.tokens):
                self._rest = None
        return documents

    def _name(self, address: DocumentAddress, offset: int) -> str:
        name = f"{self.stream.source.file_name(address.file)}:{address.row}"
        start = address.piece * self.seq_len + offset
        return f"{name}+{start}" if start else name

    def state(self) -> str:
        """The position as a JSON text: no pickle, and readable."""
        rest = None if self._rest is None else [self._rest.address, self._rest_offset]
        return json.dumps({"stream": self.stream.state_dict(), "rest": rest})

    def load_state(self, text: str) -> None:
        state = json.loads(text)
        self.stream.load_state_dict(state["stream"])
        self._rest = None
        if state["rest"] is not None:
            address, self._rest_offset = state["rest"]
            [self._rest] = self.stream.documents_at([DocumentAddress(*address)])


class PackedDataLoader(BaseDataLoader):
    """Yields `({"batch": TokenBatch}, labels_T)`, as torchtitan's trainer expects, for ever.

    Sequence i of a step is the next one of stream `i mod num_streams`. Rank r of R takes sequences r, r + R, ..., and has the
    streams r, r + R, ... to itself, since R divides their number.
    """

    def __init__(self, packers: dict[int, SequencePacker], *, batch_size: int, num_streams: int):
        self.packers = packers
        self.batch_size = batch_size
        self.num_streams = num_streams
        self._sequences = 0

    @property
    def streams(self) -> list[DocumentStream]:
        """Those of this rank."""
        return [packer.stream for packer in self.packers.values()]

    def __iter__(self) -> Iterator[tuple[dict[str, TokenBatch], torch.Tensor]]:
        while True:
            batch = self.next_batch()
            yield {"batch": batch}, batch.labels_T

    def next_batch(self) -> TokenBatch:
        packers = list(self.packers.values())
        tokens, cu_seqlens, names = [], [0], []
        for _ in range(self.batch_size):
            packer = packers[self._sequences % len(packers)]
            self._sequences += 1
            for part, name in packer.next_sequence():
                tokens.extend(part)
                cu_seqlens.append(len(tokens))
                names.append(name)
        tokens_T = torch.tensor(tokens, dtype=torch.long)
        labels_T = torch.full_like(tokens_T, IGNORE_INDEX)
        labels_T[:-1] = tokens_T[1:]
        labels_T[torch.tensor(cu_seqlens[1:]) - 1] = IGNORE_INDEX
        return TokenBatch(tokens_T, labels_T, tuple(cu_seqlens), packers[0].seq_len, tuple(names))

    # Between steps every stream has given equally many sequences: their positions are all there is.
    def state_dict(self) -> dict[str, Any]:
        return {f"stream_{i}": packer.state() for i, packer in self.packers.items()} | {"num_streams": self.num_streams}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        if state_dict["num_streams"] != self.num_streams:
            raise UserError(
                f"the checkpoint's data position is of {state_dict['num_streams']} streams, this run has {self.num_streams}; pass "
                f"--data.num_streams {state_dict['num_streams']}, or --checkpoint.exclude_from_loading dataloader to start the "
                "data anew"
            )
        for i, packer in self.packers.items():
            packer.load_state(state_dict[f"stream_{i}"])


def build_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig, **_
) -> PackedDataLoader:
    """torchtitan's dataloader builder for `[data]`.

    Raises:
        UserError: if the source cannot be read.
    """
    data, training, seed = job_config.data, job_config.training, job_config.debug.seed
    source = build_source(data, tokenizer, training.seq_len, seed)
    num_streams = data.num_streams or dp_world_size
    packers = {}
    for i in range(dp_rank, num_streams, dp_world_size):
        stream = DocumentStream(
            source,
            tokenizer,
            seq_len=training.seq_len,
            min_tokens=data.min_document_tokens or training.seq_len,
            split_long=data.long_documents == "split",
            shuffle_buffer=data.shuffle_buffer,
            seed=seed,
            number=i,
            num_streams=num_streams,
        )
        packers[i] = SequencePacker(stream, training.seq_len)
    return PackedDataLoader(packers, batch_size=training.local_batch_size, num_streams=num_streams)
