"""Texts on their way into storage: what the Ingress does with the documents of a request.

Uploads are spooled to disk as they arrive and pass through memory in pieces; only what a converter makes of an HTML,
PDF or Word file is held whole.
"""

import codecs
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from cluster.storage.durable import Storage
from memory_worker.manifest import Document
from serving.config import ConvertConfig
from serving.documents.convert import convert, is_plain
from serving.errors import NoText, NotUtf8, ProblemError

_PIECE_BYTES = 1 << 20
_SAMPLE_CHARACTERS = 12_000


class StoredText(NamedTuple):
    """A document whose text is durable, with its beginning, which its language is detected by."""

    document: Document
    sample: str


def store_text(storage: Storage, path: str, id: str, text: str) -> StoredText:
    """Stores a text that came as JSON. Raises `ProblemError` for one that holds nothing or is not Unicode."""
    if not text.strip():
        raise ProblemError(422, f"document {id!r} holds no text but white space; send a text that has some")
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise ProblemError(422, f"document {id!r} has half a surrogate pair; send valid Unicode") from None
    stored = storage.write(path, data)
    return StoredText(Document(id=id, characters=len(text), source=stored), text[:_SAMPLE_CHARACTERS])


def store_file(storage: Storage, path: str, id: str, name: str, file: IO[bytes], limits: ConvertConfig) -> StoredText:
    """Stores the text of an uploaded file, whose kind is its name's extension. Raises `UnsupportedDocument`.

    Takes as long as converting does: call it in a thread.
    """
    if not is_plain(name):
        with tempfile.TemporaryFile() as spooled:
            shutil.copyfileobj(file, spooled)
            return store_text(storage, path, id, convert(name, spooled, limits))
    reading = _Reading(name)
    with storage.writer(path) as sink:
        for piece in reading.pieces(file):
            sink.write(piece)
        if reading.blank:
            raise NoText(f"{name!r} holds no text but white space; send a file that has some")
    document = Document(id=id, characters=reading.characters, source=sink.stored)
    return StoredText(document, reading.sample)


def memory_id(title: str | None) -> str:
    """A new id for a memory that has none: made of its title, and at random."""
    slug = re.sub(r"[^a-z0-9]+", "-", (title or "").lower()).strip("-")[:60]
    return f"{slug or 'memory'}-{uuid.uuid4().hex[:8]}"


def document_id(filename: str | None, number: int) -> str:
    """A document's id from its file name: only what ids may hold, never a path."""
    stem = Path((filename or "").replace("\\", "/")).name
    kept = re.sub(r"[^A-Za-z0-9._-]", "-", stem).lstrip("._-")
    return kept[:128] or f"doc-{number}"


class _Reading:
    """UTF-8 checked and measured while it is copied."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.characters = 0
        self.blank = True
        self.sample = ""

    def pieces(self, file: IO[bytes]) -> Iterator[bytes]:
        """The file's bytes without a byte-order mark. Raises `NotUtf8`."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        read, first = 0, True
        while True:
            piece = file.read(_PIECE_BYTES)
            if first and piece.startswith(codecs.BOM_UTF8):
                piece = piece[len(codecs.BOM_UTF8) :]
            first = False
            try:
                text = decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                raise NotUtf8(
                    f"{self._name!r} is not UTF-8 (near byte {read + error.start}); convert it, for instance with: "
                    f"iconv -f {_guess_encoding(piece)} -t UTF-8 FILE > NEW"
                ) from None
            self.characters += len(text)
            self.blank = self.blank and not text.strip()
            if len(self.sample) < _SAMPLE_CHARACTERS:
                self.sample += text[: _SAMPLE_CHARACTERS - len(self.sample)]
            if not piece:
                return
            read += len(piece)
            yield piece


def _guess_encoding(piece: bytes) -> str:
    if piece.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    try:
        codecs.getincrementaldecoder("gb18030")().decode(piece)
    except UnicodeDecodeError:
        return "LATIN1"
    return "GB18030"
