"""Texts and files that tests upload, and a check of what is quoted from them."""

import io
import zipfile

import httpx


def text(name: str, edition: str, sentences: int = 12) -> str:
    """A text that no other document or edition has a sentence of."""
    return " ".join(
        f"In the {edition} edition of {name}, keeper number {i} lit the lamp of {name}." for i in range(sentences)
    )


def put(client: httpx.Client, memory: str, document: str, words: str, **headers) -> httpx.Response:
    return client.put(f"/v1/memories/{memory}/documents/{document}", json={"text": words}, headers=headers)


def check_exact(quoted: list[dict], texts: dict[str, dict[str, str]]) -> None:
    """Each is what stands at those offsets; `texts` are by memory and document."""
    for part in quoted:
        assert texts[part["memory"]][part["document"]][part["start"] : part["end"]] == part["text"], part


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
