"""The ways to answer that are compared: each a call on a running server, whose memory kind is its profile's.

memorag    clues recalled from memory, then passages, then an answer (a summary where no question is asked)
rag        the question's own passages: what memory is measured against
hyde       passages for the question and a made-up answer (Gao et al., arXiv 2212.10496)
rewrite    passages for the question and queries the generator makes of it, memory unseen
memory     the memory model alone
full       the whole text in the generator's prompt, its middle left out where it does not fit
passages   only the question's passages, without an answer: retrieval on its own
"""

from typing import Any, Literal, get_args

from serving.client.client import Answer, Memory
from serving.client.errors import MemoRAGError, ServerUnreachable
from serving.evaluation.datasets import Example

Method = Literal["memorag", "rag", "hyde", "rewrite", "memory", "full", "passages"]
METHODS: tuple[Method, ...] = get_args(Method)
_SUMMARIZE = {"en": "Write a summary of the whole text.", "zh": "请概括全文。"}
Row = dict[str, Any]


def answer_row(memory: Memory, example: Example, method: Method, *, max_tokens: int, cited: bool) -> Row:
    """What the method answers, as one row of a run. A refusal or failure of the server is a row with its `error`.

    `cited` asks for an answer with citations, as users get it; otherwise, where the metric is of phrases, for a phrase.

    Raises `ServerUnreachable`: then nothing is known of the method.
    """
    row: Row = {"example": example.id, "method": method, "kind": memory.info["kind"]}
    try:
        if method == "passages":
            passages = memory.passages(_question(example))
            return row | {"passages": _places(passages)}
        return row | _of(_ask(memory, example, method, max_tokens, cited))
    except ServerUnreachable:
        raise
    except MemoRAGError as error:
        return row | {"error": f"{error.status} {error.detail}"}


def _ask(memory: Memory, example: Example, method: Method, max_tokens: int, cited: bool) -> Answer:
    assert method != "passages"
    if method == "memorag" and not example.question:
        return memory.summarize(max_tokens=max_tokens, language=example.language)
    short = example.metric != "rouge-l" and not cited
    return memory.ask(
        _question(example), method, max_tokens=max_tokens, language=example.language, short=short, stream=False
    )


def _question(example: Example) -> str:
    return example.question or _SUMMARIZE[example.language]


def _of(answer: Answer) -> Row:
    return {
        "answer": answer.text,
        "passages": _places(answer.passages),
        "clues": [clue["text"] for clue in answer.clues],
        "degraded": answer.degraded,
        "ms": answer.timings["total"],
        "tokens": sum(answer.raw["usage"].values()),
    }


def _places(passages: list[dict[str, Any]]) -> list[list[float]]:
    return [[passage["start"], passage["end"], passage["score"]] for passage in passages]
