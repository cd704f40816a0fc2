"""The `[n]` of a generated text: read by the generators when it is complete."""

import re

from cluster.messages import Finished
from generator_worker.messages import Generation
from generator_worker.prompts import Prompt

_NUMBERS = re.compile(r"[\[【［]\s*(\d{1,4}(?:\s*[,，、;；]\s*\d{1,4})*)\s*[\]】］]")


def find_citations(text: str, passages: int) -> tuple[int, ...]:
    """The numbers, 1 to `passages`, that `text` cites, each once, in order of first mention.

    `[1]`, `[1, 2]`, `[1][2]` and `【1】` are citations; numbers without a passage are ignored.
    """
    mentioned = dict.fromkeys(int(number) for group in _NUMBERS.findall(text) for number in re.findall(r"\d+", group))
    return tuple(n for n in mentioned if 1 <= n <= passages)


def strip_citations(text: str) -> str:
    """`text` without its `[n]`."""
    return _NUMBERS.sub("", text)


def finish_generation(pieces: list[str], prompt: Prompt, finished: Finished) -> Generation:
    """The end of the answer to `prompt` whose deltas were `pieces`."""
    text = "".join(pieces)
    return Generation(
        text=text,
        sources=prompt.sources,
        citations=find_citations(text, len(prompt.sources)),
        prompt_tokens=finished.prompt_tokens,
        completion_tokens=finished.completion_tokens,
        finish_reason=finished.reason,
        cut=prompt.cut,
    )
