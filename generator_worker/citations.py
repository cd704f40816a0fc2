"""From `[n]` in a generated text to the passages meant: called by the generators when a text is complete."""

import re
from collections.abc import Sequence

from cluster.messages import Finished
from generator_worker.messages import Citation, Generation, Source
from generator_worker.prompts import Prompt

_NUMBERS = re.compile(r"[\[【［]\s*(\d{1,4}(?:\s*[,，、;；]\s*\d{1,4})*)\s*[\]】］]")


def resolve_citations(text: str, sources: Sequence[Source]) -> tuple[Citation, ...]:
    """The passages cited in `text`, each once, in order of first mention.

    `[1]`, `[1, 2]`, `[1][2]` and `【1】` are citations; numbers without a passage are ignored.
    """
    mentioned = dict.fromkeys(int(number) for group in _NUMBERS.findall(text) for number in re.findall(r"\d+", group))
    return tuple(
        Citation(n, source.memory, source.document, source.start, source.end)
        for n in mentioned
        if 1 <= n <= len(sources)
        for source in [sources[n - 1]]
    )


def strip_citations(text: str) -> str:
    """`text` without its `[n]`."""
    return _NUMBERS.sub("", text)


def finish_generation(pieces: list[str], prompt: Prompt, finished: Finished) -> Generation:
    """The end of the answer to `prompt` whose deltas were `pieces`."""
    text = "".join(pieces)
    return Generation(
        text=text,
        citations=resolve_citations(text, prompt.sources),
        sources=prompt.sources,
        prompt_tokens=finished.prompt_tokens,
        completion_tokens=finished.completion_tokens,
        finish_reason=finished.reason,
        cut=prompt.cut,
    )
