"""Files become text: what each kind gives, and what is refused with what advice."""

import io
import socket
import zipfile
from pathlib import Path

import pytest

from serving.convert import NoText, NotUtf8, UnsupportedDocument, detect_language, read_document

CHINESE = "城门在暴风雨之前被打开了两次。守门人记得每一个进来的人，也记得他们带来的消息。"


def docx(*paragraphs: str) -> bytes:
    """The smallest Word file with these paragraphs."""
    body = "".join(f"<w:p><w:r><w:t>{paragraph}</w:t></w:r></w:p>" for paragraph in paragraphs)
    namespace = "http://schemas.openxmlformats.org"
    files = {
        "[Content_Types].xml": f'<Types xmlns="{namespace}/package/2006/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        '<Override PartName="/word/document.xml" ContentType="application/vnd.openxmlformats-officedocument.'
        'wordprocessingml.document.main+xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{namespace}/package/2006/relationships"><Relationship Id="r1" '
        f'Type="{namespace}/officeDocument/2006/relationships/officeDocument" Target="word/document.xml"/>'
        "</Relationships>",
        "word/document.xml": f'<w:document xmlns:w="{namespace}/wordprocessingml/2006/main"><w:body>{body}</w:body>'
        "</w:document>",
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            archive.writestr(path, '<?xml version="1.0" encoding="UTF-8"?>' + content)
    return buffer.getvalue()


def pdf(line: str | None) -> bytes:
    """The smallest one-page PDF: with one line of text, or with only a grey box, as a scan would be."""
    content = f"BT /F1 24 Tf 72 700 Td ({line}) Tj ET" if line else "0.5 g 72 72 200 200 re f"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        "/Resources << /Font << /F1 5 0 R >> >> >>",
        f"<< /Length {len(content)} >>\nstream\n{content}\nendstream",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    trailer = f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer << /Size {size} /Root 1 0 R >>\nstartxref\n"
    return out + f"{trailer}{len(out)}\n%%EOF\n".encode()


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "b.md", "folder/c.markdown"])
def test_text_comes_back_unchanged(name: str) -> None:
    text = f"# Title\r\n\r\n  two  spaces\tand {CHINESE}\n"
    assert read_document(name, text.encode()) == text


def test_byte_order_mark_is_dropped() -> None:
    assert read_document("a.txt", b"\xef\xbb\xbfgate") == "gate"


def test_html_gives_its_text_without_scripts_and_tags() -> None:
    page = f"<html><body><script>steal()</script><h1>Gate</h1><p>Opened <b>twice</b> &amp; {CHINESE}</p></body></html>"
    text = read_document("a.html", page.encode())
    assert "Gate" in text
    assert "Opened twice & " + CHINESE in text
    assert "steal" not in text and "<" not in text and "*" not in text


def test_docx_gives_its_paragraphs() -> None:
    text = read_document("a.docx", docx("The gate opens.", CHINESE))
    assert [line for line in text.splitlines() if line] == ["The gate opens.", CHINESE]


def test_pdf_gives_its_text() -> None:
    assert "The gate opens twice" in read_document("a.pdf", pdf("The gate opens twice"))


def test_conversion_opens_no_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a conversion opened a socket")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    for name, data in {"a.pdf": pdf("x y z"), "a.docx": docx("x"), "a.html": b"<p>x</p>"}.items():
        assert read_document(name, data)
    assert not list(tmp_path.iterdir()), "a conversion left files behind"


def test_not_utf8_names_the_offset_and_the_command() -> None:
    with pytest.raises(NotUtf8, match=r"'b\.txt'.*0xe9 at offset 3;.*iconv -f LATIN1"):
        read_document("b.txt", b"caf\xe9\n")
    with pytest.raises(NotUtf8, match="iconv -f GB18030"):
        read_document("b.txt", CHINESE.encode("gb18030"))
    with pytest.raises(NotUtf8, match="iconv -f UTF-16"):
        read_document("b.txt", "gate".encode("utf-16"))


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.html", "a.pdf", "a.docx"])
def test_empty_files_are_refused(name: str) -> None:
    with pytest.raises(NoText, match="a\\."):
        read_document(name, b"")


def test_files_without_text_are_refused() -> None:
    with pytest.raises(NoText, match="white space"):
        read_document("a.txt", " \n\t\u3000".encode())
    with pytest.raises(NoText, match="white space"):
        read_document("a.html", b"<html><body><p> </p></body></html>")
    with pytest.raises(NoText, match="OCR"):
        read_document("scan.pdf", pdf(None))


@pytest.mark.parametrize("name", ["a.exe", "a", "a.pdf.zip"])
def test_unknown_types_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedDocument, match=r"no supported type \(.*\.docx.*\.pdf.*\)"):
        read_document(name, b"text")


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
