"""What the pipeline found, in the shapes of `serving.api`."""

from cluster.messages import TextDelta
from memory_worker.messages import Clue
from retrieval_worker.messages import Hit
from serving import api


def clue_out(clue: Clue) -> api.ClueOut:
    """A clue as HTTP shows it."""
    return api.ClueOut(kind=clue.kind, text=clue.text)


def passage_out(hit: Hit) -> api.PassageOut:
    """A passage as HTTP shows it."""
    passage = hit.passage
    return api.PassageOut(
        memory=passage.memory,
        document=passage.document,
        start=passage.start,
        end=passage.end,
        text=passage.text,
        score=hit.score,
    )


def citation_out(n: int, hit: Hit) -> api.CitationOut:
    """`[n]` in an answer, as HTTP shows it."""
    passage = hit.passage
    return api.CitationOut(n=n, memory=passage.memory, document=passage.document, start=passage.start, end=passage.end)


def event_out(item: Clue | Hit | TextDelta | api.Answer) -> api.Event:
    """What the pipeline yields, as an event of a stream."""
    if isinstance(item, Clue):
        return api.Event(name="clue", data=clue_out(item).model_dump())
    if isinstance(item, Hit):
        return api.Event(name="passage", data=passage_out(item).model_dump())
    if isinstance(item, TextDelta):
        return api.Event(name="token", data={"text": item.text})
    return api.Event(name="done", data=item.model_dump())
