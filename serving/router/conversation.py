"""The conversation before a question: whether the question needs it, and how much of it is read. Used by `pipeline`."""

import re
from collections.abc import Sequence

from serving import api

# Words by which a question leans on what was said before.
_LEANS = re.compile(
    r"\b(he|him|his|she|her|hers|it|its|they|them|their|theirs|this|that|these|those|there|then|here|one|ones|former|"
    r"latter|same|such|else|more|again|too|also|instead|before|after|you|your|said|mentioned|above|previous)\b",
    re.IGNORECASE,
)
_GOES_ON = re.compile(
    r"\W*(and|but|or|so|then|what about|how about|why|when|where|how|who)\W*(\w+\W*){0,2}$|\W*(and|but|or|so)\b",
    re.IGNORECASE,
)
_LEANS_ZH = re.compile("[他她它们这那其此该]|呢[？?]?$|还有|为什么[？?]?$|另外|上面|刚才|之前")
_ROLES = {
    "en": {"user": "User", "assistant": "Assistant"},
    "zh": {"user": "用户", "assistant": "助手"},
}


def stands_alone(question: str, language: api.Language) -> bool:
    """Whether nothing in the words of `question` points to what was said before. Where in doubt it does."""
    if language == "zh":
        return _LEANS_ZH.search(question) is None
    return _LEANS.search(question) is None and _GOES_ON.match(question) is None


def recent_turns(turns: Sequence[api.Turn], characters: int, language: api.Language) -> list[str]:
    """The latest turns, each with who spoke, that have at most so many characters together, oldest first.

    Of a last turn that alone has more, the beginning is left out: it was said last, and its end comes last.
    """
    kept: list[str] = []
    for turn in reversed(turns):
        content = turn.content.strip()
        if len(content) > characters:
            if kept or not characters:
                break
            content = f"…{content[-characters:]}"
        characters -= len(content)
        kept.append(f"{_ROLES[language][turn.role]}: {content}")
    return kept[::-1]
