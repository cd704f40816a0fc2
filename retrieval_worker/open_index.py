"""Indexes opened from passage files and kept open: used by the Retriever."""

import asyncio
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from itertools import accumulate, chain

from cluster.shared_cache import SharedCache
from cluster.storage.durable import Storage, StoredFile
from retrieval_worker.config import IndexConfig
from retrieval_worker.index import PassageIndex
from retrieval_worker.messages import EmbedderDescription, Index, IndexPart, Passage
from retrieval_worker.passage_file import PassageFile, PassageTexts, read_passages


class OpenIndex:
    """The passages of all parts, numbered one part after another, and the index that searches them.

    It is whole in memory: storage is not asked again.
    """

    def __init__(self, parts: Sequence[IndexPart], texts: Sequence[PassageTexts], search: PassageIndex) -> None:
        self.search = search
        self._parts = parts
        self._texts = texts
        self._firsts = list(accumulate(map(len, texts), initial=0))  # ids of first passages; their count

    @property
    def bytes(self) -> int:
        """What it holds in memory."""
        return self.search.bytes + sum(text.bytes for text in self._texts)

    def passage(self, id: int) -> Passage:
        """Raises `IndexError` where there is none."""
        part, row = _locate(self._firsts, id)
        piece, of = self._texts[part][row], self._parts[part]
        return Passage(id, of.memory, of.document, piece.start, piece.end, piece.text, piece.tokens)

    def place(self, id: int) -> tuple[StoredFile, int]:
        """The file of passage `id` and its row there. Raises `IndexError`, as `passage` does."""
        part, row = _locate(self._firsts, id)
        return self._parts[part].passages, row


class IndexShelf:
    """Opens indexes and keeps the most recently used ones open, and their files read.

    Opening an index costs, for each file that is not kept, reading, digesting and checking it, and for all of its
    passages what `PassageIndex.build` does. So a version of which one document is new reads that one document's file:
    20,000 passages of 1024 dimensions with sparse weights open in 1.4 s, with one more document in 0.5 s, on two busy
    cores. BM25, where the embedder has no sparse weights, counts the words of all passages anew: 1.8 s for 20,000. A
    kept file is in memory beside the indexes that copied its vectors.

    What is kept is known by path, and paths begin with the tenant: whether another tenant has the same text open
    cannot be told from how long an answer takes.
    """

    def __init__(
        self,
        config: IndexConfig,
        storage: Storage,
        threads: Executor,
        describe: Callable[[], Awaitable[EmbedderDescription]],
    ) -> None:
        """`threads` wait for storage; `describe` tells what the embedder is that must have made the files."""
        self._config = config
        self._storage = storage
        self._threads = threads
        self._describe = describe
        self._indexes: SharedCache[OpenIndex] = SharedCache(
            config.cached_indexes_mib << 20, lambda index: index.bytes, keep_one=True
        )
        self._files: SharedCache[PassageFile] = SharedCache(config.cached_files_mib << 20, lambda file: file.bytes)

    async def open(self, index: Index) -> OpenIndex | None:
        """None where only the index's name is given and none of that name is open.

        Raises `DamagedIndex`, which names the file, where one is missing, damaged or made by another embedder.
        """
        if index.parts is None and index.name not in self._indexes:
            return None
        return await self._indexes.get(index.name or index.parts, partial(self._open, index.parts or ()))

    async def _open(self, parts: tuple[IndexPart, ...]) -> OpenIndex:
        embedder = await self._describe()
        files = await asyncio.gather(*(self._file(part.passages, embedder) for part in parts))
        vectors = [file.vectors for file in files]
        texts = chain.from_iterable(file.passages.texts() for file in files)
        search = await asyncio.to_thread(PassageIndex.build, vectors, texts, embedder, self._config)
        return OpenIndex(parts, [file.passages for file in files], search)

    async def _file(self, file: StoredFile, embedder: EmbedderDescription) -> PassageFile:
        async def read() -> PassageFile:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, read_passages, self._storage, file, embedder)

        return await self._files.get(file, read)


def _locate(firsts: Sequence[int], id: int) -> tuple[int, int]:
    """The part that passage `id` is of, and its row there."""
    if not 0 <= id < firsts[-1]:
        raise IndexError(f"no passage {id}: there are {firsts[-1]}")
    part = bisect_right(firsts, id) - 1
    return part, id - firsts[part]
