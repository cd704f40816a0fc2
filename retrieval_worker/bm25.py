"""BM25 scores of passages: which of a query's words they hold, how often, and how rare those words are.

Built from the passages' texts when an index is opened, and searched beside their vectors (`retrieval_worker.index`).
"""

import math
import re
from collections.abc import Iterable, Iterator
from sys import getsizeof

import numpy as np

_CJK = "\u3400-\u9fff\uf900-\ufaff\u3040-\u30ff"
_WORDS = re.compile(rf"[{_CJK}]+|[^\W{_CJK}]+")


class Bm25:
    """Passages `0 … n-1`, in Lucene's form of BM25 (bm25s; k1 = 1.5, b = 0.75). Immutable: threads may ask together."""

    def __init__(self, texts: Iterable[str]) -> None:
        import bm25s

        numbers: dict[str, int] = {}
        rows = [[numbers.setdefault(word, len(numbers)) for word in words(text)] for text in texts]
        self._count = len(rows)
        self._numbers = numbers
        self._index = bm25s.BM25()
        if numbers:
            self._index.index((rows, numbers), create_empty_token=False, show_progress=False)
        postings = (self._index.scores[name] for name in ("data", "indices", "indptr")) if numbers else ()
        self.bytes = sum(array.nbytes for array in postings) + getsizeof(numbers)  # what it holds in memory
        self.bytes += sum(getsizeof(word) + getsizeof(number) for word, number in numbers.items())

    def scores(self, text: str, sparse: dict[int, float] | None = None) -> np.ndarray:
        """float32 `[passages]`; 0 where a passage holds none of the words of the query `text`."""
        known = [self._numbers[word] for word in words(text) if word in self._numbers]
        if not known:
            return np.zeros(self._count, np.float32)
        found: np.ndarray = self._index.get_scores_from_ids(known)
        return found

    def measure_grounding(self, text: str, sparse: dict[int, float] | None = None) -> float:
        """0 to 1: the most of the query's different words, each counting its idf, that one passage holds."""
        if not self._numbers:
            return 0.0
        places, passages = self._index.scores["indptr"], self._index.scores["indices"]  # of words: the passages of each
        held, all_words = np.zeros(self._count), 0.0
        for word in dict.fromkeys(words(text)):
            number = self._numbers.get(word)
            holders = passages[:0] if number is None else passages[places[number] : places[number + 1]]
            idf = math.log(1 + (self._count - len(holders) + 0.5) / (len(holders) + 0.5))
            held[holders] += idf
            all_words += idf
        return min(1.0, float(held.max() / all_words)) if all_words else 0.0


def words(text: str) -> Iterator[str]:
    """Words in lower case without English endings; of Chinese and Japanese, which have no spaces, pairs of characters.

    Pairs need no dictionary, and find as well as segmented words do (Lucene's CJKAnalyzer cuts the same way).
    """
    from Stemmer import Stemmer

    stem = Stemmer("english").stemWord  # one for each call: it is not made for several threads
    for match in _WORDS.finditer(text.lower()):
        word = match.group()
        if not re.match(f"[{_CJK}]", word):
            yield stem(word)
        elif len(word) == 1:
            yield word
        else:
            yield from (word[at : at + 2] for at in range(len(word) - 1))
