"""An answer as the server sends it."""

PASSAGE = {"document": "a", "start": 0, "end": 4, "text": "gate", "score": 0.5}
ANSWER = {
    "memory": "m", "version": "1", "task": "memorag", "answer": "twice [1]",
    "citations": [{"n": 1, "document": "a", "start": 0, "end": 4}], "evidence": [PASSAGE],
    "clues": [{"kind": "span", "text": "门 gate"}], "passages": [PASSAGE], "degraded": ["embedded-model"], "usage": {},
    "timings_ms": {"recall": 1.0, "retrieve": 2.0, "generate": 3.0, "total": 6.0},
}  # fmt: skip
