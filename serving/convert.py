"""Files that people have, made into the plain text that is memorized: called by the ingress for uploads.

What comes back is the source text: every offset that an answer cites counts characters in it.
"""

from pathlib import PurePath
from typing import Literal

_PLAIN = {".txt", ".text", ".md", ".markdown"}
_CONVERTED = {
    ".html": "text/html",
    ".htm": "text/html",
    ".pdf": "application/pdf",
    ".docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
}
# The converter writes these as Markdown marks, which are no words of the document; their text stays.
_INLINE_TAGS = ["a", "b", "strong", "i", "em", "u", "s", "del", "ins", "mark", "code", "kbd", "sub", "sup", "img"]
_SAMPLE_CHARACTERS = 4000
_SAMPLES = 3


class UnsupportedDocument(ValueError):
    """This file cannot become text; the message says why and what to do."""


class NotUtf8(UnsupportedDocument):
    """A text file that is not UTF-8."""


class NoText(UnsupportedDocument):
    """A file that holds no text: empty, only white space, or pictures of pages."""


def read_document(name: str, data: bytes) -> str:
    """The text of the file `name`, whose kind is its extension's; text and Markdown come back unchanged.

    Raises `UnsupportedDocument`, or one of its subclasses, for a file that gives no text. Takes the time of a
    conversion (a long PDF: seconds) and reads no network: call it in a thread.
    """
    suffix = PurePath(name).suffix.lower()
    if suffix in _PLAIN:
        text = decode_utf8(name, data)
    elif suffix in _CONVERTED:
        text = _convert(name, data, _CONVERTED[suffix])
    else:
        supported = ", ".join(sorted(_PLAIN | set(_CONVERTED)))
        raise UnsupportedDocument(
            f"{name!r} is of no supported type ({supported}); convert it to one, or rename it if it is text"
        )
    if not text.strip():
        if suffix == ".pdf":
            raise NoText(f"{name!r} has no text layer (scanned pages?); run OCR on it first, for instance ocrmypdf")
        raise NoText(f"{name!r} holds no text but white space; send a file that has some")
    return text


def decode_utf8(name: str, data: bytes) -> str:
    """`data` as UTF-8 without its byte-order mark. Raises `NotUtf8`."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise NotUtf8(
            f"{name!r} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}; convert it, for instance "
            f"with: iconv -f {_likely_encoding(data)} -t UTF-8 FILE > NEW"
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


def _convert(name: str, data: bytes, mime_type: str) -> str:
    import kreuzberg

    if not data:
        return ""
    config = kreuzberg.ExtractionConfig(
        use_cache=False, disable_ocr=True, output_format="plain", html_options={"strip_tags": _INLINE_TAGS}
    )
    try:
        return kreuzberg.extract_bytes_sync(data, mime_type, config).content
    except kreuzberg.KreuzbergError as error:
        reason = str(error).partition("\n")[0]
        raise UnsupportedDocument(
            f"{name!r} could not be read as {mime_type} ({reason}); check that it opens, and save it again"
        ) from None


def _likely_encoding(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    try:
        data.decode("gb18030")
    except UnicodeDecodeError:
        return "LATIN1"
    return "GB18030"
