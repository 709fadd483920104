"""Cuts streams of documents into sequences without padding.

A sequence has exactly `training.seq_len` tokens. A document that does not fit is cut; its rest begins the next sequence of the stream,
as a document of its own. In post-training a sequence is one whole prompt.
"""

import json
from typing import NamedTuple

from refine_titan.data.documents import BEGIN_ANEW, Document, DocumentAddress, DocumentStream
from refine_titan.data.questions import Question, QuestionStream
from refine_titan.errors import UserError


class PackedSequence(NamedTuple):
    """The documents of a sequence, each as tokens and name; in post-training also the question whose prompt the sequence is."""

    documents: list[tuple[list[int], str]]
    question: Question | None = None


class SequencePacker:
    """Cuts one stream of documents into sequences of `seq_len` tokens."""

    def __init__(self, stream: DocumentStream, seq_len: int):
        self.stream = stream
        self.seq_len = seq_len
        self._rest: Document | None = None
        self._rest_offset = 0

    def next_sequence(self) -> PackedSequence:
        """The next sequence; its last document is cut at the end of the sequence."""
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
        return PackedSequence(documents)

    def _name(self, address: DocumentAddress, offset: int) -> str:
        name = f"{self.stream.source.file_name(address.file)}:{address.row}"
        start = address.piece * self.seq_len + offset
        return f"{name}+{start}" if start else name

    def state(self) -> str:
        """The position as a JSON text, which is readable and needs no pickle."""
        rest = None if self._rest is None else [self._rest.address, self._rest_offset]
        return json.dumps({"stream": self.stream.state_dict(), "rest": rest})

    def load_state(self, text: str) -> None:
        state = json.loads(text)
        if "sequence" in state:
            raise UserError(
                "training.epochs is 0, but the checkpoint's run counted epochs, whose documents have another order; set it, or "
                f"{BEGIN_ANEW}"
            )
        self.stream.load_state_dict(state["stream"])
        self._rest = None
        if state["rest"] is not None:
            address, self._rest_offset = state["rest"]
            [self._rest] = self.stream.documents_at([DocumentAddress(*address)])


class QuestionPacker(SequencePacker):
    """Makes one sequence of every prompt of a stream of questions."""

    def __init__(self, stream: QuestionStream):
        super().__init__(stream, stream.seq_len)

    def next_sequence(self) -> PackedSequence:
        document = self.stream.next_document()
        return PackedSequence([(document.tokens, self._name(document.address, 0))], document.question)


def packer_of(stream: DocumentStream, seq_len: int) -> SequencePacker:
    """The packer of a stream of documents, or of questions."""
    return QuestionPacker(stream) if isinstance(stream, QuestionStream) else SequencePacker(stream, seq_len)
