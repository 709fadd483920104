"""Packs documents into batches without padding.

A sequence is a row of exactly `training.seq_len` tokens; a document that does not fit goes on in the next row, as a
document of its own. Legend: T tokens of a batch on one rank.
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


class PackedDataLoader(BaseDataLoader):
    """Yields `({"batch": TokenBatch}, labels_T)`, as torchtitan's trainer expects, for ever."""

    def __init__(self, stream: DocumentStream, *, batch_size: int, seq_len: int, rank: int, num_ranks: int):
        self.stream = stream
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.rank = rank
        self.num_ranks = num_ranks
        self._rest: Document | None = None
        self._rest_offset = 0

    def __iter__(self) -> Iterator[tuple[dict[str, TokenBatch], torch.Tensor]]:
        while True:
            batch = self.next_batch()
            yield {"batch": batch}, batch.labels_T

    def next_batch(self) -> TokenBatch:
        tokens, cu_seqlens, names = [], [0], []
        for _ in range(self.batch_size):
            room = self.seq_len
            while room:
                if self._rest is None:
                    self._rest, self._rest_offset = self.stream.next_document(), 0
                part = self._rest.tokens[self._rest_offset : self._rest_offset + room]
                tokens.extend(part)
                cu_seqlens.append(len(tokens))
                names.append(self._name(self._rest.address, self._rest_offset))
                room -= len(part)
                self._rest_offset += len(part)
                if self._rest_offset == len(self._rest.tokens):
                    self._rest = None
        tokens_T = torch.tensor(tokens, dtype=torch.long)
        labels_T = torch.full_like(tokens_T, IGNORE_INDEX)
        labels_T[:-1] = tokens_T[1:]
        labels_T[torch.tensor(cu_seqlens[1:]) - 1] = IGNORE_INDEX
        return TokenBatch(tokens_T, labels_T, tuple(cu_seqlens), self.seq_len, tuple(names))

    def _name(self, address: DocumentAddress, offset: int) -> str:
        name = f"{self.stream.source.file_name(address.file)}:{address.row}"
        start = address.piece * self.seq_len + offset
        return f"{name}+{start}" if start else name

    # A checkpoint holds one JSON text per data-parallel rank: no pickle, and readable.
    def state_dict(self) -> dict[str, Any]:
        rest = None if self._rest is None else [self._rest.address, self._rest_offset]
        state = {"stream": self.stream.state_dict(), "rest": rest}
        return {f"rank_{self.rank}": json.dumps(state), "num_ranks": self.num_ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        if state_dict["num_ranks"] != self.num_ranks:
            raise UserError(
                f"the checkpoint's data position is of {state_dict['num_ranks']} data-parallel ranks, this run has "
                f"{self.num_ranks}; pass --checkpoint.exclude_from_loading dataloader to start the data anew"
            )
        state = json.loads(state_dict[f"rank_{self.rank}"])
        self.stream.load_state_dict(state["stream"])
        self._rest = None
        if state["rest"] is not None:
            address, self._rest_offset = state["rest"]
            [self._rest] = self.stream.documents_at([DocumentAddress(*address)])


def build_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig, **_
) -> PackedDataLoader:
    """torchtitan's dataloader builder for `[data]`.

    Raises:
        UserError: if the source cannot be read.
    """
    data, training, seed = job_config.data, job_config.training, job_config.debug.seed
    source = build_source(data, tokenizer, training.seq_len, seed)
    stream = DocumentStream(
        source,
        tokenizer,
        seq_len=training.seq_len,
        min_tokens=data.min_document_tokens or training.seq_len,
        split_long=data.long_documents == "split",
        shuffle_buffer=data.shuffle_buffer,
        seed=seed,
        rank=dp_rank,
        num_ranks=dp_world_size,
    )
    return PackedDataLoader(
        stream, batch_size=training.local_batch_size, seq_len=training.seq_len, rank=dp_rank, num_ranks=dp_world_size
    )
