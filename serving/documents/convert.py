"""Files that people have, made into the plain text that is memorized: called by the ingress for uploads.

What comes back is the source text: every offset that an answer cites counts characters in it. HTML, PDF and Word files
come from strangers, and their converter is large and native: it runs in a process of its own, with limits.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path, PurePath
from typing import IO, Literal

from serving.config import ConvertConfig
from serving.errors import ConversionFailed, NoText, NotUtf8, UnsupportedDocument

_PLAIN = {".txt", ".text", ".md", ".markdown"}
_CONVERTED = {
    ".html": "text/html",
    ".htm": "text/html",
    ".pdf": "application/pdf",
    ".docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
}
KINDS = frozenset({*_PLAIN, *_CONVERTED})  # extensions of files that give text
_WORKER = Path(__file__).with_name("convert_worker.py")
_SAMPLE_CHARACTERS = 4000
_SAMPLES = 3


_DEFAULT_LIMITS = ConvertConfig()


def read_document(name: str, data: bytes, limits: ConvertConfig = _DEFAULT_LIMITS) -> str:
    """The text of the file `name`, whose kind is its extension's; text and Markdown come back unchanged.

    Raises `UnsupportedDocument`, or one of its subclasses, for a file that gives no text. Takes the time of a
    conversion (at least that of starting a process, at most `limits.seconds`): call it in a thread.
    """
    mime_type = _mime_type(name)
    if mime_type is None:
        return _with_words(name, decode_utf8(name, data))
    with tempfile.TemporaryFile() as source:
        source.write(data)
        source.seek(0)
        return _with_words(name, _convert(name, source, mime_type, limits))


def read_document_file(name: str, path: Path, limits: ConvertConfig = _DEFAULT_LIMITS) -> str:
    """`read_document` of the file at `path`, without reading into memory what is converted elsewhere."""
    mime_type = _mime_type(name)
    if mime_type is None:
        return _with_words(name, decode_utf8(name, path.read_bytes()))
    with path.open("rb") as source:
        return _with_words(name, _convert(name, source, mime_type, limits))


def decode_utf8(name: str, data: bytes) -> str:
    """`data` as UTF-8 without its byte-order mark. Raises `NotUtf8`."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise NotUtf8(
            f"{name!r} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}; convert it, for instance "
            f"with: iconv -f {_guess_encoding(data)} -t UTF-8 FILE > NEW"
        ) from None


def detect_language(text: str) -> Literal["en", "zh"]:
    """The language whose prompts suit `text`: Chinese for Chinese, English for everything else.

    Takes samples from the start, middle and end, so a long text costs no more than a short one.
    """
    import py3langid

    last = max(0, len(text) - _SAMPLE_CHARACTERS)
    starts = sorted({last * i // (_SAMPLES - 1) for i in range(_SAMPLES)})
    sample = "\n".join(text[start : start + _SAMPLE_CHARACTERS] for start in starts)
    return "zh" if py3langid.classify(sample)[0] == "zh" else "en"


def is_plain(name: str) -> bool:
    """Whether the file is text as it is. Raises `UnsupportedDocument` for a kind that cannot become text."""
    return _mime_type(name) is None


def _mime_type(name: str) -> str | None:
    """What the file is converted from; None for text, which is not converted."""
    suffix = PurePath(name).suffix.lower()
    if suffix in _PLAIN:
        return None
    if suffix not in _CONVERTED:
        supported = ", ".join(sorted(_PLAIN | set(_CONVERTED)))
        raise UnsupportedDocument(
            f"{name!r} is of no supported type ({supported}); convert it to one, or rename it if it is text"
        )
    return _CONVERTED[suffix]


def _with_words(name: str, text: str) -> str:
    if text.strip():
        return text
    if PurePath(name).suffix.lower() == ".pdf":
        raise NoText(f"{name!r} has no text layer (scanned pages?); run OCR on it first, for instance ocrmypdf")
    raise NoText(f"{name!r} holds no text but white space; send a file that has some")


def _convert(name: str, source: IO[bytes], mime_type: str, limits: ConvertConfig) -> str:
    """The text of `source`, by a converter that has three open files, an empty folder and no environment of ours.

    Its output goes to files, not pipes: their size is bounded by the kernel, and a converter that was killed cannot
    leave a reader waiting.
    """
    arguments = [mime_type, str(math.ceil(limits.seconds)), str(limits.memory_bytes), str(limits.characters)]
    with (
        tempfile.TemporaryDirectory(prefix="memorag-convert-") as scratch,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(_WORKER), *arguments],
                stdin=source,
                stdout=out,
                stderr=err,
                cwd=scratch,
                env=_environment(scratch),
                timeout=limits.seconds,
            )
        except subprocess.TimeoutExpired:
            raise _too_slow(name, limits) from None
        err.seek(0)
        if done.returncode:
            raise _failure(name, mime_type, limits, done.returncode, err.read().decode(errors="replace"))
        out.seek(0)
        return out.read().decode()


def _environment(scratch: str) -> dict[str, str]:
    """Nothing of the server's, whose environment holds secrets. Few threads and arenas, whose reserved address space
    counts as memory."""
    return {
        "PATH": os.defpath,
        "HOME": scratch,
        "TMPDIR": scratch,
        "MALLOC_ARENA_MAX": "2",
        "TOKIO_WORKER_THREADS": "1",
        "RAYON_NUM_THREADS": "1",
    }


def _failure(name: str, mime_type: str, limits: ConvertConfig, status: int, stderr: str) -> UnsupportedDocument:
    """What is said of a converter that ended with `status`, not 0."""
    kind, reason = _parse_failure(stderr)
    if kind == "unreadable":
        return UnsupportedDocument(
            f"{name!r} could not be read as {mime_type} ({reason}); check that it opens, and save it again"
        )
    if kind == "characters":
        return ConversionFailed(
            f"{name!r} gives {reason} characters of text, more than the {limits.characters:,} that are taken; split it"
        )
    if status == -signal.SIGXCPU:
        return _too_slow(name, limits)
    if kind == "memory" or "memory allocation of" in stderr:  # the latter: how the native converter says it, and aborts
        return ConversionFailed(
            f"converting {name!r} takes more than {limits.memory_bytes / 2**20:,.0f} MiB of memory; split it, "
            "or convert it to text yourself"
        )
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return ConversionFailed(
        f"the converter ended while reading {name!r} ({how}): the file is damaged, or needs more than "
        f"{limits.memory_bytes / 2**20:,.0f} MiB of memory; save it again, split it, or convert it to text yourself"
    )


def _parse_failure(stderr: str) -> tuple[str, str]:
    """The kind and reason in the worker's last line; empty where it did not come to say anything."""
    try:
        said = json.loads(stderr.strip().rpartition("\n")[2])
        return said["kind"], said["reason"]
    except (ValueError, TypeError, KeyError):
        return "", ""


def _too_slow(name: str, limits: ConvertConfig) -> ConversionFailed:
    return ConversionFailed(
        f"converting {name!r} takes longer than {limits.seconds:g} s; split it, or convert it to text yourself"
    )


def _guess_encoding(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    try:
        data.decode("gb18030")
    except UnicodeDecodeError:
        return "LATIN1"
    return "GB18030"
