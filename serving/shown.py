"""What the pipeline found, in the shapes of `serving.api` and of the Generator."""

from generator_worker.messages import Source
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


def source_of(hit: Hit) -> Source:
    """A passage as the Generator reads it."""
    passage = hit.passage
    return Source(passage.memory, passage.document, passage.start, passage.end, passage.text, hit.score)
