"""Indexes are opened from intact files only, read no file twice, and keep tenants apart. No model, no Ray."""

import asyncio
import gc
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cluster.shared_cache import SharedCache
from cluster.storage.durable import Storage, StorageGone
from retrieval_worker.config import IndexConfig
from retrieval_worker.errors import DamagedIndex
from retrieval_worker.messages import Embeddings, Index, IndexPart
from retrieval_worker.open_index import IndexShelf, OpenIndex
from retrieval_worker.passage_file import read_passages
from tests.support.passage_files import described, made_vectors, part, write_made


class CountingStorage(Storage):
    """Tells which files were read, and lets a test hold reading up."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.read_paths: list[str] = []
        self.open = threading.Event()
        self.open.set()
        self.waiting = threading.Semaphore(0)

    def read(self, file):
        if not self.open.is_set():
            self.waiting.release()
            self.open.wait()
        self.read_paths.append(file.path)
        return super().read(file)


@pytest.fixture
def storage(tmp_path):
    return CountingStorage(str(tmp_path / "root"))


@pytest.fixture
def threads():
    with ThreadPoolExecutor(2) as threads:
        yield threads


def shelf_of(storage, threads, sparse=False, **config) -> IndexShelf:
    async def describe():
        return described(sparse)

    return IndexShelf(IndexConfig(**config), storage, threads, describe)


@pytest.fixture
def shelf(storage, threads):
    return shelf_of(storage, threads)


def index_of(*files) -> Index:
    return Index(tuple(map(part, files)))


def best(opened: OpenIndex, seed: int, row: int) -> int:
    """The passage found with the very vector of row `row` of the file made from `seed`."""
    query = made_vectors(row + 1, seed=seed).dense.astype(np.float32)
    return opened.search.search("", Embeddings(query, None), row, 1)[0][0]


async def test_passages_are_numbered_over_all_parts_and_know_where_they_are_from(shelf, storage):
    files = [
        write_made(storage, "t/a/v1/one.safetensors", 5, seed=1),
        write_made(storage, "t/a/v1/none.safetensors", 0),
        write_made(storage, "t/b/v7/two.safetensors", 7, seed=2),
    ]
    opened = await shelf.open(index_of(*files))
    found = [opened.passage(id) for id in range(12)]
    assert [p.id for p in found] == list(range(12))
    assert [(p.memory, p.document) for p in found] == [("a", "one")] * 5 + [("b", "two")] * 7
    assert [p.text for p in found] == [f"é😀 {i}" for i in [*range(5), *range(7)]]
    assert all(p.end - p.start == len(p.text) for p in found)
    assert opened.place(4) == (files[0], 4) and opened.place(5) == (files[2], 0) and opened.place(11) == (files[2], 6)
    assert best(opened, 1, 4) == 4 and best(opened, 2, 6) == 11
    for wrong in (-1, 12):
        with pytest.raises(IndexError, match="there are 12"):
            opened.passage(wrong)
        with pytest.raises(IndexError):
            opened.place(wrong)


async def test_an_index_that_is_open_is_known_by_its_name(storage, threads):
    shelf = shelf_of(storage, threads, cached_indexes_mib=1)
    parts = index_of(write_made(storage, "t/a/v1/one.safetensors", 10_000, seed=1)).parts
    index = Index(parts, "t/a/v1")
    assert await shelf.open(index.by_name) is None
    opened, again = await asyncio.gather(shelf.open(index), shelf.open(index.by_name))
    assert opened is again is await shelf.open(Index(None, "t/a/v1"))
    await shelf.open(Index(parts, "t/a/v2"))
    assert await shelf.open(index.by_name) is None, "another has taken its place"
    assert await shelf.open(index) is not None
    assert Index(parts).by_name == Index(parts), "what has no name is given whole"


async def test_a_new_version_reads_only_the_new_document(shelf, storage):
    old = [write_made(storage, f"t/a/v1/{i}.safetensors", 10, seed=i) for i in range(4)]
    await shelf.open(index_of(*old))
    await shelf.open(index_of(*old))
    assert sorted(storage.read_paths) == [file.path for file in old]
    new = write_made(storage, "t/a/v2/9.safetensors", 10, seed=9)
    storage.read_paths.clear()
    opened = await shelf.open(index_of(*old[:2], new, old[3]))
    assert storage.read_paths == [new.path]
    assert best(opened, 9, 3) == 23 and best(opened, 3, 3) == 33
    assert opened.passage(23).document == "9"
    assert opened.passage(best(opened, 2, 0)).document != "2", "it was replaced"


async def test_an_open_index_needs_no_storage(shelf, storage, tmp_path):
    first, second = (write_made(storage, f"t/a/v1/{i}.safetensors", 10_000, seed=i) for i in (1, 2))
    await shelf.open(index_of(first))
    (tmp_path / "root").rename(tmp_path / "away")
    opened = await shelf.open(index_of(first))
    assert best(opened, 1, 9_999) == 9_999 and opened.passage(9_999).text == "é😀 9999"
    with pytest.raises(StorageGone, match="bring it back"):  # which is no damage: nothing is made again for it
        await shelf.open(index_of(first, second))
    (tmp_path / "away").rename(tmp_path / "root")
    assert best(await shelf.open(index_of(first, second)), 2, 9_999) == 19_999, "a failure is not kept"


async def test_slow_storage_keeps_nobody_from_open_indexes(shelf, storage):
    files = [write_made(storage, f"t/a/v1/{i}.safetensors", 10, seed=i) for i in range(41)]
    await shelf.open(index_of(files[0]))
    storage.open.clear()
    hanging = [asyncio.create_task(shelf.open(index_of(file))) for file in files[1:]]
    try:
        for _ in range(2):  # all threads that may wait for storage do
            await asyncio.to_thread(storage.waiting.acquire)
        opened = await shelf.open(index_of(files[0]))
        assert await asyncio.to_thread(best, opened, 0, 3) == 3
    finally:
        storage.open.set()
        await asyncio.gather(*hanging)


async def test_equal_text_of_two_tenants_is_two_texts(shelf, storage):
    mine, theirs = (write_made(storage, f"{tenant}/m/v1/d.safetensors", 5) for tenant in ("mine", "theirs"))
    assert mine.digest == theirs.digest
    await shelf.open(index_of(mine))
    opened = await shelf.open(index_of(theirs))
    assert sorted(storage.read_paths) == [mine.path, theirs.path]
    assert opened.place(0) == (theirs, 0)


async def test_one_file_under_two_names_is_not_confused(shelf, storage):
    file = write_made(storage, "t/a/v1/d.safetensors", 5)
    for memory, document in (("a", "d"), ("copy", "e")):
        opened = await shelf.open(Index((IndexPart(memory, document, file),)))
        assert (opened.passage(0).memory, opened.passage(0).document) == (memory, document)


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete"])
async def test_the_damaged_one_of_many_is_named(shelf, storage, harm):
    files = [write_made(storage, f"t/a/v1/{i}.safetensors", 10, seed=i) for i in range(6)]
    place = Path(storage.root) / files[3].path
    data = bytearray(place.read_bytes())
    if harm == "flip":
        data[200] ^= 4
        place.write_bytes(data)
    elif harm == "truncate":
        os.truncate(place, len(data) // 2)
    else:
        place.unlink()
    for _ in range(2):
        with pytest.raises(DamagedIndex) as caught:
            await shelf.open(index_of(*files))
        assert caught.value.path == files[3].path


async def test_kept_files_are_bounded_by_their_bytes(storage, threads):
    shelf = shelf_of(storage, threads, cached_files_mib=1, cached_indexes_mib=1)
    large = [
        write_made(storage, f"t/a/v1/{i}.safetensors", 3000, seed=i) for i in range(3)
    ]  # two of them are over 0.8 MiB
    for file in large:
        await shelf.open(index_of(file))
    storage.read_paths.clear()
    await shelf.open(index_of(large[2]))
    assert storage.read_paths == [], "open"
    await shelf.open(index_of(large[0], large[2]))
    assert storage.read_paths == [large[0].path], "the longest unused was given up"


@pytest.mark.parametrize("sparse", [False, True], ids=["bm25", "sparse"])
async def test_open_indexes_are_bounded_by_their_bytes(storage, threads, sparse):
    shelf = shelf_of(storage, threads, sparse, cached_files_mib=0, cached_indexes_mib=1)
    small = [write_made(storage, f"t/a/v1/{i}.safetensors", 900, sparse, seed=i) for i in range(6)]
    opened = [await shelf.open(index_of(file)) for file in small]
    fit = (1 << 20) // opened[0].bytes
    assert 2 <= fit < 6
    storage.read_paths.clear()
    for file in reversed(small):
        await shelf.open(index_of(file))
    assert storage.read_paths == [file.path for file in reversed(small[:-fit])], "only the last that fit were open"


@pytest.mark.parametrize("sparse", [False, True], ids=["bm25", "sparse"])
async def test_an_index_weighs_its_vectors_words_and_texts(storage, threads, sparse):
    file = write_made(storage, "t/a/v1/d.safetensors", 2000, sparse)
    opened = await shelf_of(storage, threads, sparse).open(index_of(file))
    held = read_passages(storage, file, described(sparse))
    postings = 8 * len(held.vectors.sparse.tokens) if held.vectors.sparse else 2 * 8 * 2000  # weight and passage, each
    assert postings <= opened.bytes - held.vectors.dense.nbytes - held.passages.bytes <= postings + 300_000


async def test_an_index_larger_than_the_bound_stays_open_while_it_is_the_last(storage, threads):
    shelf = shelf_of(storage, threads, cached_files_mib=0, cached_indexes_mib=1)
    files = [write_made(storage, f"t/a/v1/{i}.safetensors", 10_000, seed=i) for i in range(2)]
    for file in (files[0], files[0], files[1], files[1]):
        await shelf.open(index_of(file))
    assert storage.read_paths == [file.path for file in files]


async def test_a_closed_index_is_gone_from_memory(storage, threads):
    shelf = shelf_of(storage, threads, cached_files_mib=0, cached_indexes_mib=1)
    gc.disable()
    try:
        opened = await shelf.open(index_of(write_made(storage, "t/a/v1/1.safetensors", 10_000)))
        opened.passage(0)
        gone = weakref.ref(opened.search)
        del opened
        await shelf.open(index_of(write_made(storage, "t/a/v1/2.safetensors", 10_000)))
        assert gone() is None
    finally:
        gc.enable()


async def test_values_are_made_once_and_the_heaviest_not_kept():
    cache = SharedCache[int](10, lambda value: value)
    made = []

    async def make(value: int) -> int:
        made.append(value)
        await asyncio.sleep(0)
        return value

    async def get(value: int) -> int:
        return await cache.get(value, lambda: make(value))

    assert await asyncio.gather(get(4), get(4), get(5)) == [4, 4, 5] and made == [4, 5]
    await get(4)
    await get(2)  # 11 in all: the 5 was used longest ago
    assert 4 in cache and 2 in cache and 5 not in cache
    assert await get(11) == 11 and 11 not in cache and 4 in cache
