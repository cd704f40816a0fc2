"""From `[n]` in a generated text to the passages meant: called by the generators when a text is complete."""

import re
from collections.abc import Sequence

from generator_worker.messages import Citation, Source

_NUMBERS = re.compile(r"[\[【［]\s*(\d{1,4}(?:\s*[,，、;；]\s*\d{1,4})*)\s*[\]】］]")


def resolve_citations(text: str, sources: Sequence[Source]) -> tuple[Citation, ...]:
    """The passages cited in `text`, each once, in order of first mention.

    `[1]`, `[1, 2]`, `[1][2]` and `【1】` are citations; numbers without a passage are ignored.
    """
    mentioned = dict.fromkeys(int(number) for group in _NUMBERS.findall(text) for number in re.findall(r"\d+", group))
    return tuple(
        Citation(n, sources[n - 1].document, sources[n - 1].start, sources[n - 1].end)
        for n in mentioned
        if 1 <= n <= len(sources)
    )
