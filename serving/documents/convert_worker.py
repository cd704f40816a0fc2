"""One conversion in a process of its own: a file on stdin becomes UTF-8 text on stdout, within limits of the kernel.

`documents.convert` runs this file as a script, with `python -I`: it imports nothing of ours, so it starts in the time
of the converter alone, and nothing that a file makes the converter do happens in the server's process.

What it cannot convert it says as one line of JSON on stderr, `{"kind": …, "reason": …}`, and exits with 1.
"""

import json
import re
import resource
import sys

_DEPTH = 2048  # elements within each other, which is what lxml takes
_OPEN_FILES = 32  # the libraries are loaded one at a time, and the converter's runtime takes a handful


def main(mime_type: str, seconds: int, memory_bytes: int, characters: int) -> int:
    """Converts stdin; the exit status."""
    confine(seconds, memory_bytes, output_bytes=4 * characters)
    try:
        text = _text(sys.stdin.buffer.read(), mime_type)
    except MemoryError:
        return _fail("memory", "")
    except _Unreadable as error:
        return _fail("unreadable", str(error).partition("\n")[0])
    if len(text) > characters:
        return _fail("characters", f"{len(text):,}")
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()
    return 0


def confine(seconds: int, memory_bytes: int, output_bytes: int) -> None:
    """Limits this process for the rest of its life: CPU seconds, address space, bytes of any file it writes.

    The number of processes is not limited: that limit counts all that the user runs, and the converter needs threads.
    """
    for limit, wanted in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, output_bytes),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        # One second of CPU more for the hard limit, which kills: the soft one is a signal that says what happened.
        resource.setrlimit(limit, (value, value if limit != resource.RLIMIT_CPU or value == hard else value + 1))


class _Unreadable(Exception):
    """The converter's own words for what is wrong with a file."""


def _text(data: bytes, mime_type: str) -> str:
    if not data:
        return ""
    if mime_type == "text/html":
        return _html_text(data)
    import kreuzberg

    config = kreuzberg.ExtractionConfig(use_cache=False, disable_ocr=True, output_format="plain")
    try:
        return kreuzberg.extract_bytes_sync(data, mime_type, config).content
    except kreuzberg.KreuzbergError as error:
        raise _Unreadable(error) from error


def _html_text(data: bytes) -> str:
    """What a browser would show. Not kreuzberg's: its plain text leaves out what stands in a `div` without a `p`."""
    import lxml.html
    from inscriptis import Inscriptis
    from inscriptis.css_profiles import CSS_PROFILES
    from inscriptis.html_properties import Display
    from inscriptis.model.config import ParserConfig
    from inscriptis.model.html_element import HtmlElement

    hidden, line = HtmlElement(display=Display.none), HtmlElement(display=Display.block)
    style = CSS_PROFILES["strict"] | dict.fromkeys(("noscript", "template"), hidden)
    style |= dict.fromkeys(("dd", "dt", "option", "section", "tr"), line)
    if not (page := _decode(data).strip()):
        return ""
    parser = lxml.html.HTMLParser(huge_tree=True, encoding="utf-8")
    tree = lxml.html.document_fromstring(page.encode(), parser=parser)
    if any(entry.type_name == "ERR_RESOURCE_LIMIT" for entry in parser.error_log):  # what comes after it is lost
        raise _Unreadable(f"it has more than {_DEPTH:,} elements within each other")
    sys.setrecursionlimit(20 * _DEPTH)
    return str(Inscriptis(tree, ParserConfig(css=style, table_cell_separator=" ")).get_text()).strip()


def _decode(data: bytes) -> str:
    """HTML by its byte-order mark, else the encoding it declares, else UTF-8, else what browsers take it for."""
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            return data.decode(encoding, errors="replace")
    declared = re.search(rb"<meta[^>]{1,200}charset\s*=\s*[\"']?([\w.:-]{1,40})", data[:4096], re.IGNORECASE)
    try:
        if declared:
            name = declared[1].decode().lower()
            return data.decode(_BROWSERS_READ_AS.get(name, name), errors="replace")
        return data.decode("utf-8")
    except (LookupError, UnicodeDecodeError):
        return data.decode("cp1252", errors="replace")


_BROWSERS_READ_AS = {
    "iso-8859-1": "cp1252",
    "latin1": "cp1252",
    "ascii": "cp1252",
    "gb2312": "gb18030",
    "gbk": "gb18030",
}


def _fail(kind: str, reason: str) -> int:
    print(json.dumps({"kind": kind, "reason": reason}), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
