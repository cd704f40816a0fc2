"""Sentence boundaries with exact offsets, for the evidence of an answer."""

import re

_CJK = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\u3040-\u30ff]")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")


def sentences(text: str, language: str | None = None) -> list[tuple[int, int]]:
    """Slices `(start, end)` of the sentences of `text`, in order, without surrounding white space.

    `language` is a code such as en or zh; none detects Chinese by its script. What holds no letter or
    digit is not a sentence.
    """
    from sentencex import get_sentence_boundaries

    slices = []
    for boundary in get_sentence_boundaries(language or detect_language(text), text):
        start, end = boundary["start_index"], boundary["end_index"]
        piece = text[start:end]
        if any(character.isalnum() for character in piece):
            start += len(piece) - len(piece.lstrip())
            slices.append((start, start + len(piece.strip())))
    return slices


def detect_language(text: str) -> str:
    """`zh` where Chinese characters outweigh Latin words (of some four letters each), else `en`."""
    return "zh" if 4 * len(_CJK.findall(text)) > len(_LATIN.findall(text)) else "en"
