"""How the columns of a Parquet file are coded, read from its footer before Arrow reads the file.

Arrow itself can tell, but only with accessors that end the whole process where a footer is not valid (pyarrow 26
does for an unknown codec). A footer is a struct in Thrift's compact protocol, of which this reads what Parquet uses.
"""

from collections.abc import Iterator
from typing import Any

_MAGIC = b"PAR1"
_MAX_DEPTH = 16

# Field numbers in https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
_ROW_GROUPS, _COLUMNS, _META_DATA, _ENCODINGS, _CODEC = 4, 1, 3, 2, 4


def column_codings(data: memoryview) -> Iterator[tuple[int, frozenset[int]]]:
    """Codec and encodings, by their Parquet numbers, of each column of each row group. Raises `ValueError`."""
    size = int.from_bytes(data[-8:-4], "little")
    if len(data) < 12 or data[-4:] != _MAGIC or size > len(data) - 12:
        raise ValueError("it is not a Parquet file")
    try:
        footer = _Thrift(bytes(data[-8 - size : -8])).struct()
        for group in footer[_ROW_GROUPS]:
            for column in group[_COLUMNS]:
                described = column[_META_DATA]
                yield described[_CODEC], frozenset(described[_ENCODINGS])
    except (LookupError, TypeError) as error:  # something is missing, or is not what it should be
        raise ValueError("its footer is not one of a Parquet file") from error


class _Thrift:
    """A reader of the compact protocol: structs become dicts by field number."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        if depth > _MAX_DEPTH:
            raise ValueError("its footer is nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while header := self._byte():
            number = number + (header >> 4) if header >> 4 else self._integer()
            if number in fields:  # which of the two counts is for no reader to choose
                raise ValueError(f"its footer has field {number} twice")
            kind = header & 15
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2, 3):  # a boolean in a list; a byte
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind in (7, 8):
            return self._bytes(8 if kind == 7 else self._varint())
        if kind in (9, 10):
            header = self._byte()
            count = header >> 4 if header >> 4 < 15 else self._varint()
            return [self._value(header & 15, depth) for _ in range(count)]
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError(f"its footer has a value of kind {kind}")

    def _byte(self) -> int:
        self._place += 1
        return self._data[self._place - 1]

    def _bytes(self, size: int) -> bytes:
        self._place += size
        return self._data[self._place - size : self._place]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("its footer has a number without end")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
