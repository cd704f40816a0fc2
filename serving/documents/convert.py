"""Files that people have, made into the plain text that is memorized: called for uploads.

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
import time
from contextlib import suppress
from pathlib import Path, PurePath
from typing import IO, Literal

import psutil

from serving.config import ConvertConfig
from serving.errors import ConversionFailed, NoText, UnsupportedDocument

_PLAIN = {".txt", ".text", ".md", ".markdown"}
_CONVERTED = {
    ".html": "text/html",
    ".htm": "text/html",
    ".pdf": "application/pdf",
    ".docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
}
KINDS = frozenset({*_PLAIN, *_CONVERTED})  # extensions of files that give text
_WORKER = Path(__file__).with_name("convert_worker.py")
_TICK_S = 0.5
_MOVING = 0.01  # of the CPU seconds that a converter may take, what it uses at least in as many seconds
_SAMPLE_CHARACTERS = 4000
_SAMPLES = 3


def convert(name: str, source: IO[bytes], limits: ConvertConfig) -> str:
    """The text of the file `name` on disk, whose kind is its extension's; `source` is read from its beginning.

    Raises `UnsupportedDocument`, or one of its subclasses, for a file that gives no text. Takes the time of a
    conversion, at least that of starting a process: call it in a thread.
    """
    source.seek(0)
    text = _run_worker(name, source, _CONVERTED[PurePath(name).suffix.lower()], limits)
    if text.strip():
        return text
    if PurePath(name).suffix.lower() == ".pdf":
        raise NoText(f"{name!r} has no text layer (scanned pages?); run OCR on it first, for instance ocrmypdf")
    raise NoText(f"{name!r} holds no text but white space; send a file that has some")


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
    suffix = PurePath(name).suffix.lower()
    if suffix not in KINDS:
        supported = ", ".join(sorted(KINDS))
        raise UnsupportedDocument(
            f"{name!r} is of no supported type ({supported}); convert it to one, or rename it if it is text"
        )
    return suffix in _PLAIN


def _run_worker(name: str, source: IO[bytes], mime_type: str, limits: ConvertConfig) -> str:
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
        command = [sys.executable, "-I", str(_WORKER), *arguments]
        with subprocess.Popen(
            command, stdin=source, stdout=out, stderr=err, cwd=scratch, env=_environment(scratch)
        ) as converter:
            try:
                status = _await_end(converter, limits.seconds)
            finally:
                converter.kill()
        if status is None:
            raise _too_slow(name, limits)
        err.seek(0)
        if status:
            raise _failure(name, mime_type, limits, status, err.read().decode(errors="replace"))
        out.seek(0)
        return out.read().decode()


def _await_end(converter: "subprocess.Popen[bytes]", seconds: float) -> int | None:
    """Its exit status; none where it has computed for `seconds`, or has done nothing for so long.

    What is counted is its own CPU time, for beside other work it takes longer, and that is no fault of the file.
    """
    measured, used_then = time.monotonic(), 0.0
    while True:
        with suppress(subprocess.TimeoutExpired):
            return converter.wait(timeout=min(seconds, _TICK_S))
        times, now = psutil.Process(converter.pid).cpu_times(), time.monotonic()
        if (used := times.user + times.system) >= seconds:
            return None
        if used - used_then > _MOVING * seconds:
            measured, used_then = now, used
        elif now - measured >= seconds:
            return None


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
