"""Files become text: what each kind gives, and what is refused with what advice."""

import json
import os
import re
import tempfile
import zlib
from pathlib import Path

import pytest

from serving.config import ConvertConfig
from serving.documents import convert
from serving.documents.convert import detect_language
from serving.errors import ConversionFailed, NoText, UnsupportedDocument
from tests.support.documents import docx, pdf

CHINESE = "城门在暴风雨之前被打开了两次。守门人记得每一个进来的人，也记得他们带来的消息。"


LIMITS = ConvertConfig()


def read_document(name: str, data: bytes, limits: ConvertConfig = LIMITS) -> str:
    assert not convert.is_plain(name)
    with tempfile.TemporaryFile() as source:
        source.write(data)
        return convert.convert(name, source, limits)


def test_html_gives_its_text_without_scripts_and_tags() -> None:
    page = f"<html><body><script>steal()</script><h1>Gate</h1><p>Opened <b>twice</b> &amp; {CHINESE}</p></body></html>"
    text = read_document("a.html", page.encode())
    assert "Gate" in text
    assert "Opened twice & " + CHINESE in text
    assert "steal" not in text and "<" not in text and "*" not in text


@pytest.mark.parametrize(
    "page, text",
    [
        ("<div>one</div><div>two <p>three</p></div>four", "one\ntwo\n\nthree\n\nfour"),
        (
            "<table><tr><td>a</td><td>b</td></tr><tr><td>c</table><ul><li>d<li>e</ul>",
            "a b\nc\n\n  * d\n  * e",
        ),
        ("x\n <i>y</i>, <b>z</b>w<br>v<pre>a\n b</pre>u", "x y, zw\nv\na\n b\nu"),
        ("<title>T</title><style>p{}</style>&lt;b&gt;&nbsp;c<!-- d --><![if !x]>e<![endif]>", "<b> ce"),
        ("<?xml version='1.0' encoding='utf-8'?><select><option>a<option>b</select><dl><dt>c<dd>d</dl>", "a\nb\nc\nd"),
        ("a<noscript>b</noscript><template>c</template><!-- d --> e", "a e"),
        ("1 < 2 & 3 <![bogus[ x ]]>4</p></nothing><unknown>5", "1 < 2 & 3 45"),
    ],
)
def test_html_gives_what_a_browser_shows(page: str, text: str) -> None:
    assert read_document("a.html", page.encode()) == text


@pytest.mark.parametrize(
    "data",
    [
        CHINESE.encode(),
        b"\xef\xbb\xbf" + CHINESE.encode(),
        CHINESE.encode("utf-16"),
        b'<meta charset="gb2312">' + CHINESE.encode("gb18030"),
        b"<meta http-equiv=Content-Type content='text/html; charset=gbk'>" + CHINESE.encode("gbk"),
        b"<meta charset=rot13>" + "".join(f"&#{ord(c)};" for c in CHINESE).encode(),
    ],
)
def test_html_is_decoded_as_it_declares(data: bytes) -> None:
    assert read_document("a.html", data) == CHINESE


def test_html_that_declares_nothing_and_is_not_utf8_is_windows_1252() -> None:
    assert read_document("a.html", b"caf\xe9 \x96") == "café –"


def test_docx_gives_its_paragraphs() -> None:
    text = read_document("a.docx", docx("The gate opens.", CHINESE))
    assert [line for line in text.splitlines() if line] == ["The gate opens.", CHINESE]


def test_pdf_gives_its_text() -> None:
    assert "The gate opens twice" in read_document("a.pdf", pdf("The gate opens twice"))


@pytest.mark.parametrize("name", ["a.html", "a.pdf", "a.docx"])
def test_empty_files_are_refused(name: str) -> None:
    with pytest.raises(NoText, match="a\\."):
        read_document(name, b"")


def test_files_without_text_are_refused() -> None:
    with pytest.raises(NoText, match="white space"):
        read_document("a.html", b"<html><body><p> </p></body></html>")
    with pytest.raises(NoText, match="OCR"):
        read_document("scan.pdf", pdf(None))


@pytest.mark.parametrize("name", ["a.exe", "a", "a.pdf.zip"])
def test_unknown_types_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedDocument, match=r"no supported type \(.*\.docx.*\.pdf.*\)"):
        convert.is_plain(name)


@pytest.mark.parametrize("name", ["a.pdf", "a.docx"])
def test_damaged_files_are_refused(name: str) -> None:
    whole = pdf("The gate") if name == "a.pdf" else docx("The gate")
    for data in (b"this is not such a file", whole[: len(whole) // 3]):
        with pytest.raises(UnsupportedDocument, match=f"'{name}'"):
            read_document(name, data)


def test_language() -> None:
    assert detect_language("The gate was opened twice before the storm.") == "en"
    assert detect_language(CHINESE) == "zh"
    assert detect_language("Das Tor wurde vor dem Sturm zweimal geöffnet, sagte der Wächter.") == "en"
    assert detect_language("Gate log.\n" + CHINESE * 2000) == "zh"
    assert detect_language("x") == "en"


# -- files that attack the converter -----------------------------------------------------------------------


def docx_bomb(mebibytes: int) -> bytes:
    """A Word file of a few hundred kilobytes whose one paragraph is `mebibytes` long."""
    return docx("a" * (mebibytes << 20))


def pdf_bomb(mebibytes: int) -> bytes:
    """A PDF of a few hundred kilobytes whose one page is drawn by `mebibytes` of operators."""
    line = b"BT /F1 24 Tf 72 700 Td (aaaaaaaaaaaaaaaaaaaa) Tj ET\n"
    content = zlib.compress(line * ((mebibytes << 20) // len(line)))
    head, tail = pdf("PLACE").split(b"stream\n", 1)
    head = re.sub(rb"<< /Length \d+ >>", b"<< /Length %d /Filter /FlateDecode >>" % len(content), head)
    return head + b"stream\n" + content + b"\nendstream" + tail.partition(b"\nendstream")[2]


def small(**limits: float) -> ConvertConfig:
    return ConvertConfig.model_validate({"seconds": 60, "memory_bytes": 2**29, **limits})


@pytest.mark.parametrize("bomb", ["200 MiB a.docx", "80 MiB a.docx", "64 MiB a.pdf"])
def test_a_bomb_is_refused(bomb: str) -> None:
    name, mebibytes = bomb.split()[2], int(bomb.split()[0])
    with pytest.raises(UnsupportedDocument, match=f"'{name}'.*(memory|limit)"):
        read_document(name, {"a.docx": docx_bomb, "a.pdf": pdf_bomb}[name](mebibytes), small())


def nested(depth: int) -> bytes:
    return b"<p>Gate</p>" + b"<div>" * depth + b"opens" + b"</div>" * depth + b"twice"


def test_deep_nesting_loses_no_text() -> None:
    assert read_document("a.html", nested(2000), small()) == "Gate\n\nopens\ntwice"
    with pytest.raises(UnsupportedDocument, match=r"'a.html' .* more than 2,048 elements within each other"):
        read_document("a.html", nested(200_000), small())


def test_too_much_text_is_refused() -> None:
    with pytest.raises(ConversionFailed, match=r"gives 1,\d\d\d characters of text, more than the 1,000"):
        read_document("a.html", b"<p>" + b"word " * 300 + b"</p>", small(characters=1000))


def test_too_slow_is_refused() -> None:
    with pytest.raises(ConversionFailed, match=r"longer than 0.01 s; split it"):
        read_document("a.pdf", pdf("x"), small(seconds=0.01))
    with pytest.raises(ConversionFailed, match=r"'a.html' takes longer than 1 s"):
        read_document("a.html", b"<p>word word</p>" * 2_000_000, small(seconds=1))


def worker(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """Puts a script in the converter's place, which can use what the real one has."""
    script = folder / "worker.py"
    real = Path(convert.__file__).with_name("convert_worker.py")
    load = f"import os, resource, runpy, signal, sys\nreal = runpy.run_path({str(real)!r})\n"
    script.write_text(load + "real['confine'](*(int(v) for v in sys.argv[2:]))\n" + code)
    monkeypatch.setattr(convert, "_WORKER", script)


@pytest.mark.parametrize(
    "code, said",
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", r"ended while reading 'a.pdf' \(SIGSEGV\)"),
        ("os.abort()", r"\(SIGABRT\)"),
        ("print('[]', file=sys.stderr); sys.exit(7)", r"\(exit status 7\)"),
        ("os.kill(os.getpid(), signal.SIGXCPU)", "longer than 60 s"),
        ("x = bytearray(1 << 30)", r"exit status 1.*needs more than 512 MiB"),
        ("real['main'].__globals__['_text'] = lambda *_: bytearray(1 << 30); "
         "sys.exit(real['main'](*sys.argv[1:2], *map(int, sys.argv[2:])))", "takes more than 512 MiB of memory"),
        ("while True: pass", None),
    ],
)  # fmt: skip
def test_a_converter_that_dies_is_a_clear_refusal(
    code: str, said: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker(monkeypatch, tmp_path, code)
    limits = small() if said else small(seconds=0.5)
    with pytest.raises(ConversionFailed, match=said or r"longer than 0.5 s"):
        read_document("a.pdf", pdf("x"), limits)


def test_a_converter_that_waits_for_its_turn_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It computes little in much more time than it may take, as beside many other processes."""
    slowly = "import time\nbegun = time.monotonic()\n"
    slowly += "while time.monotonic() - begun < 4: time.sleep(0.05); sum(range(100_000))\nprint('gate')"
    worker(monkeypatch, tmp_path, slowly)
    assert read_document("a.pdf", pdf("x"), small(seconds=2)) == "gate\n"


def test_a_converter_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker(monkeypatch, tmp_path, "signal.pause()")
    with pytest.raises(ConversionFailed, match=r"longer than 0.5 s"):
        read_document("a.pdf", pdf("x"), small(seconds=0.5))


def test_cpu_time_is_limited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker(monkeypatch, tmp_path, "resource.setrlimit(resource.RLIMIT_CPU, (1, 2))\nwhile True: pass")
    with pytest.raises(ConversionFailed, match="longer than 60 s"):
        read_document("a.pdf", pdf("x"), small())


def test_what_a_converter_has_and_has_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    show = "import json; names = [n for n in dir(resource) if 'RLIMIT_' in n]; "
    show += "limits = {n: resource.getrlimit(getattr(resource, n)) for n in names}; "
    show += "files = sorted(os.listdir('/proc/self/fd'))[:-1]; "  # the last is the listing's own
    show += "print(json.dumps([limits, files, dict(os.environ), os.getcwd(), os.listdir(), sys.path]))"
    worker(monkeypatch, tmp_path, show)
    monkeypatch.setenv("MEMORAG_SECRET", "x" * 40)
    with (tmp_path / "open").open("wb") as leaked:
        os.set_inheritable(leaked.fileno(), True)
        limits, files, environment, folder, content, paths = json.loads(read_document("a.pdf", b"x", small()))
    assert limits["RLIMIT_AS"] == [2**29, 2**29] and limits["RLIMIT_CPU"] == [60, 61]
    assert limits["RLIMIT_FSIZE"] == [20_000_000] * 2 and limits["RLIMIT_CORE"] == [0, 0]
    assert limits["RLIMIT_NOFILE"] == [32, 32]
    assert files == ["0", "1", "2"]
    assert "MEMORAG_SECRET" not in environment and environment["HOME"] == folder
    assert content == [] and not Path(folder).exists()
    assert str(Path.cwd()) not in paths


def test_a_conversion_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert read_document("a.pdf", pdf("x"))
    with pytest.raises(ConversionFailed):
        read_document("a.pdf", pdf("x"), small(seconds=0.01))
    assert not list(tmp_path.iterdir())
