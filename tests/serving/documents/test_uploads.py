"""Texts reach storage byte for byte, or are refused and leave nothing."""

import io

import pytest

from cluster.storage.durable import Storage
from serving.config import ConvertConfig
from serving.documents.uploads import _PIECE_BYTES, document_id, store_file, store_text
from serving.errors import NoText, NotUtf8, ProblemError, UnsupportedDocument

LIMITS = ConvertConfig()
PATH = "acme/book/v000001-00000001/source/a.txt"


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(str(tmp_path))


def stored(storage: Storage, name: str, data: bytes):
    return store_file(storage, PATH, "a", name, io.BytesIO(data), LIMITS)


@pytest.mark.parametrize("text", ["plain", "门 𝒳 é\r\n", "\ufeffbegins with a mark", "\0"])
def test_a_text_of_json_is_kept_exactly(storage: Storage, text: str) -> None:
    document, sample = store_text(storage, PATH, "a", text)
    assert storage.read(document.source).to_pybytes().decode() == text
    assert (document.id, document.characters, sample) == ("a", len(text), text)


@pytest.mark.parametrize(
    ("text", "words"), [("", "white space"), (" \n\u3000", "white space"), ("\ud800 x", "Unicode")]
)
def test_a_text_that_is_none_is_refused(storage: Storage, text: str, words: str) -> None:
    with pytest.raises(ProblemError, match=words) as refused:
        store_text(storage, PATH, "a", text)
    assert refused.value.status == 422 and storage.files() == []


@pytest.mark.parametrize("shift", [-2, -1, 0, 1])
def test_characters_are_counted_across_pieces(storage: Storage, shift: int) -> None:
    text = "x" * (_PIECE_BYTES + shift) + "𝒳门" * 10
    document, sample = stored(storage, "a.txt", text.encode())
    assert storage.read(document.source).to_pybytes() == text.encode()
    assert document.characters == len(text) and text.startswith(sample) and 1000 < len(sample) < 20_000


def test_a_byte_order_mark_is_left_out(storage: Storage) -> None:
    document, sample = stored(storage, "a.md", b"\xef\xbb\xbfwords")
    assert storage.read(document.source).to_pybytes() == b"words"
    assert (document.characters, sample) == (5, "words")


@pytest.mark.parametrize(
    ("name", "data", "error"),
    [
        ("a.txt", b"good \xff\xfe", NotUtf8),
        ("a.txt", b"x" * (_PIECE_BYTES - 1) + "门".encode()[:2], NotUtf8),
        ("a.txt", b"", NoText),
        ("a.txt", " \n\u2003".encode() * 10, NoText),
        ("a.exe", b"MZ", UnsupportedDocument),
        ("a", b"words", UnsupportedDocument),
        ("", b"words", UnsupportedDocument),
        ("a.docx", b"PK broken", UnsupportedDocument),
    ],
)
def test_a_refused_file_leaves_nothing(storage: Storage, name: str, data: bytes, error: type) -> None:
    with pytest.raises(error):
        stored(storage, name, data)
    assert storage.files() == []


def test_where_bytes_are_wrong_is_said(storage: Storage) -> None:
    with pytest.raises(NotUtf8, match=rf"near byte {_PIECE_BYTES + 3}"):
        stored(storage, "a.txt", b"x" * (_PIECE_BYTES + 3) + b"\xff")


def test_the_command_that_mends_it_is_said(storage: Storage) -> None:
    chinese = "城门在暴风雨之前被打开了两次。"
    for data, encoding in [
        (b"caf\xe9\n", "LATIN1"), ("gate".encode("utf-16"), "UTF-16"), (chinese.encode("gb18030"), "GB18030"),
        (b"x" * (_PIECE_BYTES - 3) + chinese.encode("gb18030"), "GB18030"),  # a piece ends within a character
    ]:  # fmt: skip
        with pytest.raises(NotUtf8, match=f"iconv -f {encoding}"):
            stored(storage, "b.txt", data)


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "b.md", "folder/c.markdown"])
def test_text_is_kept_unchanged(storage: Storage, name: str) -> None:
    text = "# Title\r\n\r\n  two  spaces\tand é门\n".encode()
    assert storage.read(stored(storage, name, text).document.source).to_pybytes() == text


def test_html_is_converted(storage: Storage) -> None:
    document, sample = stored(storage, "a.html", b"<p>One</p><script>no()</script><p>Two</p>")
    assert storage.read(document.source).to_pybytes() == b"One\n\nTwo" and sample == "One\n\nTwo"
    assert document.characters == 8


@pytest.mark.parametrize(
    ("filename", "id"),
    [
        ("book.txt", "book.txt"),
        ("../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("/etc/shadow.txt", "shadow.txt"),
        ("...", "doc-3"),
        ("", "doc-3"),
        (None, "doc-3"),
        (".hidden.txt", "hidden.txt"),
        ("-rf.txt", "rf.txt"),
        ("名前.txt", "txt"),
        ("a b\0c\n.txt", "a-b-c-.txt"),
        ("a\u202etxt.exe", "a-txt.exe"),
        ("x" * 300 + ".txt", "x" * 128),
    ],
)
def test_ids_from_file_names(filename, id) -> None:
    assert document_id(filename, 3) == id
