"""Reads structs in Thrift's compact protocol, in which parquet files have their footer and the headers of their pages.

https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md. Every length is bounded by the bytes that are there, and
only what is asked for is kept.
"""

import math
from typing import Any, BinaryIO

# Types of the protocol, in the header of a field.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_BITS = {_I16: 16, _I32: 32, _I64: 64}
_DEEPEST = 16
# Fields of a struct that are kept, by their numbers: None for a value as it is, the fields of a struct or of the structs in a list.
Kept = dict[int, "Kept | None"]


class ThriftReader:
    """Reads structs from the bytes of a file that follow its position."""

    def __init__(self, file: BinaryIO, nbytes: int, max_memory: float = math.inf, bytes_per_item: int = 0):
        """
        Args:
            nbytes: how many bytes belong to what is read.
            max_memory: what the items of all lists may take in memory, of those who read the same bytes.
            bytes_per_item: what an item of a list that is kept takes.
        """
        self._file = file
        self._end = file.tell() + nbytes
        self._memory, self._bytes_per_item = max_memory, bytes_per_item

    def struct(self, kept: Kept, depth: int = 0) -> dict[int, Any]:
        """Reads a struct, and keeps some of its fields.

        Raises:
            ValueError: it is damaged, or has a field twice.
            TooMuchMemory: its lists take more than `max_memory`.
        """
        if depth > _DEEPEST:
            raise ValueError("nested too deeply")
        found, number = {}, 0
        while header := self._byte():
            number = number + (header >> 4) if header >> 4 else self._number(_I16)
            if number not in kept:
                self._skip(header & 15, depth)
            elif number in found:
                raise ValueError(f"field {number} twice")
            else:
                found[number] = self._value(header & 15, kept[number], depth)
        return found

    def _value(self, kind: int, kept: Kept | None, depth: int) -> Any:
        if kind in _BITS:
            return self._number(kind)
        if kind == _STRUCT:
            return self.struct(kept or {}, depth + 1)
        if kind == _LIST:
            kind, size = self._list_header(self._bytes_per_item)
            return [self._value(kind, kept, depth + 1) for _ in range(size)]
        self._skip(kind, depth)
        return None

    def _skip(self, kind: int, depth: int) -> None:
        if kind in (_TRUE, _FALSE):  # the header says which
            return
        if kind in _BITS:
            self._varint()
        elif kind == _BINARY:
            self._seek(self._varint())
        elif kind in (_BYTE, _DOUBLE):
            self._seek(1 if kind == _BYTE else 8)
        elif kind == _STRUCT:
            self.struct({}, depth + 1)
        elif kind in (_LIST, _SET):
            self._skip_items(*self._list_header(), depth + 1)
        elif kind == _MAP:
            self._skip_map(depth + 1)
        else:
            raise ValueError(f"type {kind}, which Thrift does not have")

    def _list_header(self, bytes_per_item: int = 0) -> tuple[int, int]:
        """The type of a list's items and their number, each of which takes a byte and more; `bytes_per_item` in memory, if kept."""
        header = self._byte()
        kind, size = header & 15, header >> 4
        size = self._varint() if size == 15 else size
        self._check_room(size)
        # Of an empty struct or text the other reader makes an object.
        self._memory -= size * (bytes_per_item or (128 if kind == _STRUCT else 32))
        if self._memory < 0:
            raise TooMuchMemory
        return kind, size

    def _skip_items(self, kind: int, size: int, depth: int) -> None:
        if depth > _DEEPEST:
            raise ValueError("nested too deeply")
        if kind in (_TRUE, _FALSE, _BYTE, _DOUBLE):
            self._seek(size * (8 if kind == _DOUBLE else 1))
            return
        for _ in range(size):
            self._skip(kind, depth)

    def _skip_map(self, depth: int) -> None:
        if size := self._varint():
            self._check_room(size)
            kinds = self._byte()
            for _ in range(size):
                self._skip_items(kinds >> 4, 1, depth)
                self._skip_items(kinds & 15, 1, depth)

    def _check_room(self, nbytes: int) -> None:
        if nbytes > self._end - self._file.tell():
            raise ValueError("a length beyond the end")

    def _seek(self, nbytes: int) -> None:
        self._check_room(nbytes)
        self._file.seek(nbytes, 1)

    def _byte(self) -> int:
        found = self._file.read(1)
        if not found:
            raise ValueError("the file ends")
        return found[0]

    def _varint(self) -> int:
        value = shift = 0
        while shift < 64:
            found = self._byte()
            value |= (found & 127) << shift
            if found < 128:
                return value
            shift += 7
        raise ValueError("a number without end")

    def _number(self, kind: int) -> int:
        """A signed number, in which the lowest bit is the sign. Other readers cut off what does not fit the type."""
        value = self._varint()
        if value >> _BITS[kind]:
            raise ValueError(f"a number of more than {_BITS[kind]} bits")
        return (value >> 1) ^ -(value & 1)


class TooMuchMemory(Exception):
    """The lists of a struct take more memory than allowed."""
