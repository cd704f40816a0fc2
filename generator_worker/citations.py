"""The `[n]` of a generated text, and the stream that ends with them: what both generators send."""

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing

from cluster.messages import Finished, TextDelta
from generator_worker.messages import GenerateRequest, Generation, SourcesRead
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


async def follow_generation(
    request: GenerateRequest, prompt: Prompt, outputs: AsyncGenerator[TextDelta | Finished, None]
) -> AsyncGenerator[SourcesRead | TextDelta | Generation, None]:
    """What a Generator streams, of what a model writes after `prompt`. Closing it closes `outputs`.

    Nothing comes before the model's first output: a replica that dies before that can be asked again.
    """
    pieces: list[str] = []
    told = False
    async with aclosing(outputs):
        async for output in outputs:
            if not told:
                told = True
                yield SourcesRead(prompt.sources)
            if isinstance(output, Finished):
                text = "".join(pieces)
                yield Generation(
                    text=text,
                    citations=find_citations(text, len(prompt.sources)),
                    prompt_tokens=output.prompt_tokens,
                    completion_tokens=output.completion_tokens,
                    finish_reason=output.reason,
                    cut=prompt.cut,
                )
            else:
                pieces.append(output.text)
                if request.stream:
                    yield output
