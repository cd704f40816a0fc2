"""What an Arrow IPC file's record batches are, read from its footer before Arrow reads any of them.

Arrow decompresses a record batch as soon as it is asked for, to the size that the file claims, and cannot be told not
to; so a few kilobytes can take gigabytes. The Segment's reader asks here first. Footer and messages are flatbuffers,
of which this reads what Arrow uses: https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format
"""

import struct
from collections.abc import Iterator

_MAGIC = b"ARROW1"
_CONTINUATION = 0xFFFFFFFF  # begins every message
_BLOCK = struct.Struct("<qi4xq")  # a message's offset, its bytes before the body, the body's bytes

# Field numbers in https://github.com/apache/arrow/tree/main/format: File.fbs and Message.fbs
_DICTIONARIES, _RECORD_BATCHES = 2, 3  # of Footer
_VERSION, _HEADER_TYPE, _HEADER, _BODY_LENGTH, _CUSTOM_METADATA = 0, 1, 2, 3, 4  # of Message
_COMPRESSION = 3  # of RecordBatch
_V5, _IS_RECORD_BATCH = 4, 3


def require_plain(data: memoryview) -> None:
    """Raises `ValueError` unless all that Arrow will hand out of this file are bytes of it, each at most once.

    That is: no dictionaries, and record batches that are not compressed and lie in the file one after another.
    """
    size = int.from_bytes(data[-10:-6], "little")
    start = len(data) - 10 - size
    if start < 8 or data[:6] != _MAGIC or data[-6:] != _MAGIC:
        raise ValueError("it is not an Arrow file")
    footer = _Table.root(data[start:-10])
    if any(True for _ in footer.blocks(_DICTIONARIES)):
        raise ValueError("it has dictionaries")
    end = 8
    for offset, head, body in footer.blocks(_RECORD_BATCHES):
        if offset < end or head < 8 or body < 0 or offset + head + body > start:
            raise ValueError("it has a record batch that lies outside the file, or within another")
        _require_plain_message(data[offset : offset + head], body)
        end = offset + head + body


def _require_plain_message(data: memoryview, body: int) -> None:
    continuation, size = struct.unpack_from("<Ii", data)
    if continuation != _CONTINUATION or size != len(data) - 8:
        raise ValueError("it has a message of another length than its footer says")
    message = _Table.root(data[8:])
    if message.number(_VERSION, "<h") != _V5 or message.number(_HEADER_TYPE, "<B") != _IS_RECORD_BATCH:
        raise ValueError("it has a message that is not a record batch of the present format")
    if message.number(_BODY_LENGTH, "<q") != body:
        raise ValueError("it has a record batch of another length than its footer says")
    batch = message.table(_HEADER)
    # Arrow 0.17 wrote the codec into the message's metadata, and is still understood.
    if batch is None or batch.has(_COMPRESSION) or message.has(_CUSTOM_METADATA):
        raise ValueError("it has a compressed record batch")


class _Table:
    """A table of a flatbuffer. Whatever lies outside its bytes is a `ValueError`."""

    def __init__(self, data: memoryview, place: int) -> None:
        self._data = data
        self._place = place
        self._vtable = place - self._at(place, "<i")
        self._fields = (self._at(self._vtable, "<H") - 4) // 2

    @classmethod
    def root(cls, data: memoryview) -> "_Table":
        if len(data) < 4:
            raise ValueError("it has a flatbuffer without a root")
        return cls(data, int.from_bytes(data[:4], "little"))

    def has(self, field: int) -> bool:
        return self._where(field) is not None

    def number(self, field: int, kind: str) -> int:
        """A number of this `struct` format; 0 where it is left out."""
        place = self._where(field)
        return 0 if place is None else self._at(place, kind)

    def table(self, field: int) -> "_Table | None":
        place = self._where(field)
        return None if place is None else _Table(self._data, self._follow(place))

    def blocks(self, field: int) -> Iterator[tuple[int, int, int]]:
        """The items of a vector of blocks."""
        place = self._where(field)
        if place is None:
            return
        vector = self._follow(place)
        first, count = vector + 4, self._at(vector, "<I")
        if first + count * _BLOCK.size > len(self._data):
            raise ValueError("it has a list that is longer than its footer")
        for number in range(count):
            yield _BLOCK.unpack_from(self._data, first + number * _BLOCK.size)

    def _where(self, field: int) -> int | None:
        offset = self._at(self._vtable + 4 + 2 * field, "<H") if field < self._fields else 0
        return self._place + offset if offset else None

    def _follow(self, place: int) -> int:
        return place + self._at(place, "<I")

    def _at(self, place: int, kind: str) -> int:
        if not 0 <= place <= len(self._data) - struct.calcsize(kind):
            raise ValueError("it has a flatbuffer that refers to what lies outside of it")
        number: int = struct.unpack_from(kind, self._data, place)[0]
        return number
