"""An archive holds a whole memory or is refused; nothing in it names a path."""

import io
import tarfile

import pytest

from cluster.storage.durable import DamagedFile, Storage
from memory_worker.manifest import MemoryKey
from memory_worker.storage.store import seal
from serving.documents.archive import Archive, pack
from serving.errors import ProblemError
from tests.support import manifests as made

TARGET = MemoryKey("other", "copy", "v000001-0000000f")


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(str(tmp_path / "there"))


@pytest.fixture
def data(storage: Storage) -> bytes:
    return b"".join(pack(storage, made.memory(storage)))


def rewritten(data: bytes, change) -> bytes:
    """The archive with its members, names to contents, changed."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    change(members)
    return tarred([(tarfile.TarInfo(name), content) for name, content in members.items()])


def tarred(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def refusal(data: bytes, tmp_path) -> str:
    """Why it is refused, when it is opened or unpacked."""
    with pytest.raises(ProblemError) as refused:
        Archive(io.BytesIO(data)).unpack(Storage(str(tmp_path / "here")), TARGET)
    assert refused.value.status == 422 and "memorag export" in refused.value.detail
    return refused.value.detail


def test_what_is_unpacked_is_what_was_packed(storage: Storage, data: bytes, tmp_path) -> None:
    here = Storage(str(tmp_path / "here"))
    was, now = made.memory(storage), Archive(io.BytesIO(data)).unpack(here, TARGET)
    assert (now.tenant, now.memory, now.version, now.parent) == ("other", "copy", "v000001-0000000f", None)
    assert [file.digest for file in now.files] == [file.digest for file in was.files]
    assert sorted(here.files()) == sorted(file.path for file in now.files)
    assert all(file.path.startswith(f"{TARGET.path}/") for file in now.files)
    for before, after in zip(was.files, now.files, strict=True):
        assert here.read(after).to_pybytes() == storage.read(before).to_pybytes()
    same = {"tenant", "memory", "version", "parent", "created", "head", "documents"}
    assert now.model_dump(exclude=same) == was.model_dump(exclude=same)


def test_equal_files_are_packed_once(storage: Storage) -> None:
    manifest = made.memory(storage, documents=("a",))
    twin = manifest.documents[0].model_copy(update={"id": "twin"})
    both = b"".join(pack(storage, manifest.model_copy(update={"documents": (manifest.documents[0], twin)})))
    with tarfile.open(fileobj=io.BytesIO(both)) as tar:
        assert len(tar.getnames()) == len(set(tar.getnames())) == 1 + len({file.digest for file in manifest.files})


def test_a_damaged_file_ends_the_archive_before_it_is_one(storage: Storage) -> None:
    manifest = made.memory(storage)
    storage.write(manifest.documents[1].source.path, b"another text")
    pieces = pack(storage, manifest)
    with pytest.raises(DamagedFile, match=r"source/b\.txt"):
        list(pieces)


def test_every_truncation_is_refused(data: bytes, tmp_path) -> None:
    whole = len(data.rstrip(b"\0"))
    for length in [0, 1, 511, 512, 700, *range(1024, whole, 512), whole - 1]:
        refusal(data[:length], tmp_path)


def test_every_flipped_byte_is_refused_or_changes_nothing(storage: Storage, data: bytes, tmp_path) -> None:
    was = [file.digest for file in made.memory(storage).files]
    accepted = 0
    for place in range(0, len(data), 97):
        flipped = data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]
        try:
            now = Archive(io.BytesIO(flipped)).unpack(Storage(str(tmp_path / "here")), TARGET)
        except ProblemError as refused:
            assert refused.status == 422
        else:  # in the padding
            accepted += 1
            assert [file.digest for file in now.files] == was
    assert accepted < len(data) // 97


def test_a_changed_file_is_named(data: bytes, tmp_path) -> None:
    def change(members: dict[str, bytes]) -> None:
        name = next(name for name, content in members.items() if content == b"the text of b")
        members[name] = b"the text of c"

    assert "source/b.txt does not match its SHA-256" in refusal(rewritten(data, change), tmp_path)


def test_a_missing_file_is_named(storage: Storage, data: bytes, tmp_path) -> None:
    digest = made.memory(storage).head.digest
    assert f"lacks the file {digest}" in refusal(rewritten(data, lambda m: m.pop(digest)), tmp_path)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([], "manifest"),
        ([("other", b"x")], "begin with a manifest"),
        ([("manifest.json", b"")], "begin with a manifest"),
        ([("manifest.json", b"{}")], "is not a manifest"),
        ([("manifest.json", b"[" * 100_000)], "is not a manifest"),
        ([("manifest.json", b"\xff\xfe")], "is not a manifest"),
        ([("manifest.json", b'{"sha256": "0", "manifest": {"format": 3}}')], "does not match its SHA-256"),
    ],
)
def test_what_is_no_archive_of_ours(members, words, tmp_path) -> None:
    data = tarred([(tarfile.TarInfo(name), content) for name, content in members])
    assert words in refusal(data, tmp_path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_folders_and_devices_are_refused(storage: Storage, data: bytes, kind, tmp_path) -> None:
    manifest = made.memory(storage)
    link = tarfile.TarInfo(manifest.head.digest)
    link.type, link.linkname = kind, "/etc/passwd"
    tar = tarred([(tarfile.TarInfo("manifest.json"), seal(manifest)), (link, b"")])
    assert "links or folders" in refusal(tar, tmp_path)


@pytest.mark.parametrize("id", ["../../escaped", "a/b", "", "..", "a\0b", "x" * 200])
def test_document_ids_cannot_be_paths(storage: Storage, id: str, tmp_path) -> None:
    manifest = made.memory(storage, documents=("a",))
    named = manifest.documents[0].model_copy(update={"id": id})
    data = b"".join(pack(storage, manifest.model_copy(update={"documents": (named,)})))
    assert "is not a document id" in refusal(data, tmp_path)
    assert not list(tmp_path.rglob("escaped*"))


def test_a_document_cannot_be_there_twice_or_none_be(storage: Storage, tmp_path) -> None:
    manifest = made.memory(storage, documents=("a",))
    for documents in ((), manifest.documents * 2):
        data = b"".join(pack(storage, manifest.model_copy(update={"documents": documents})))
        assert "names a document twice, or none" in refusal(data, tmp_path)


def test_files_that_no_record_names_are_left_behind(data: bytes, tmp_path) -> None:
    stuffed = rewritten(data, lambda members: members.update({"../../evil": b"x", "f" * 64: b"y"}))
    here = Storage(str(tmp_path / "here"))
    now = Archive(io.BytesIO(stuffed)).unpack(here, TARGET)
    assert sorted(here.files()) == sorted(file.path for file in now.files)
    assert not list(tmp_path.rglob("evil"))
