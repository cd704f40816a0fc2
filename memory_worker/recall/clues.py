"""Clues from generated text: the Recaller feeds text as it is generated and gets each line once it is complete."""

import re

# "1. ", "2) ", "(3) ", "一、", "Q1: ", "- ", "* ", "• ", but not the "3." of "3.5 million".
_BULLET = re.compile(
    r"^(?:[-*•·–—▪]+\s+|[•·▪]|[（(]?(?:Q|q)?(?:\d{1,3}|[一二三四五六七八九十]{1,3})(?:[.:)）：．](?=\s|[^\x00-\x7f]|$)|、))\s*"
)
_QUOTES = {'"': '"', "“": "”", "‘": "’", "「": "」", "『": "』", "«": "»", "`": "`"}
_IDEOGRAPH = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")
_LEAST_CHARACTERS = 3  # letters and digits, an ideograph counting as two


class ClueLines:
    """Splits one generated text into clues: its distinct lines, without numbering, bullets and quotation marks."""

    def __init__(self, max_clues: int) -> None:
        self._left = max_clues
        self._line = ""
        self._seen: set[str] = set()

    @property
    def full(self) -> bool:
        """Whether no more clues will come, whatever is fed."""
        return self._left <= 0

    def feed(self, text: str) -> list[str]:
        """The clues that `text` completes; often none."""
        *complete, self._line = (self._line + text).split("\n")
        return [clue for line in complete if (clue := self._clue(line)) is not None]

    def close(self) -> list[str]:
        """The clue in the last line, which no new line ended, if it is one."""
        clue = self._clue(self._line)
        self._line = ""
        return [] if clue is None else [clue]

    def _clue(self, line: str) -> str | None:
        clue = _strip(line)
        if self.full or clue.casefold() in self._seen or _length(clue) < _LEAST_CHARACTERS:
            return None
        self._seen.add(clue.casefold())
        self._left -= 1
        return clue


def _strip(line: str) -> str:
    clue = " ".join(line.replace("\ufffd", "").split())
    clue = _BULLET.sub("", clue, count=1).strip()
    if len(clue) > 1 and _QUOTES.get(clue[0]) == clue[-1] and clue[0] not in clue[1:-1]:
        clue = clue[1:-1].strip()
    return clue


def _length(clue: str) -> int:
    return sum(2 if _IDEOGRAPH.match(character) else 1 for character in clue if character.isalnum())
