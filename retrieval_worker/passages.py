"""Texts into passages: used by the Retriever.

A passage is a slice of its document: offsets count Unicode code points and map back exactly.
"""

from collections.abc import Iterator

# The splitter takes quadratic time where a text has no boundaries, so it is given no more than this at once.
_SLAB_CHARACTERS = 16_384
_SLAB_ENDS = ("\n\n", "\n", "。", ". ", " ")


def cut(text: str, max_characters: int, overlap_characters: int = 0) -> list[tuple[int, int]]:
    """Cuts `text` at paragraphs, lines, sentences or words, the largest that fit, into slices in order.

    Each slice `(start, end)` has at most `max_characters` characters and neither begins nor ends with white
    space; all that lies outside of them is white space. Neighbours share up to `overlap_characters`.
    """
    from semantic_text_splitter import TextSplitter

    splitter = TextSplitter(max_characters, overlap=min(overlap_characters, max_characters - 1))
    slices = []
    for begin, end in _slabs(text, max(_SLAB_CHARACTERS, 4 * max_characters)):
        for offset, chunk in splitter.chunk_indices(text[begin:end]):
            if chunk.strip():
                slices.append((begin + offset, begin + offset + len(chunk)))
    return slices


def _slabs(text: str, size: int) -> Iterator[tuple[int, int]]:
    """Slices that cover `text`, each at most `size` long and ending at the best boundary of its second half."""
    start = 0
    while len(text) - start > size:
        middle = start + size // 2
        for mark in _SLAB_ENDS:
            found = text.rfind(mark, middle, start + size)
            if found >= 0:
                end = found + len(mark)
                break
        else:
            end = start + size
        yield start, end
        start = end
    yield start, len(text)
