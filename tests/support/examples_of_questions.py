"""Examples for tests."""

from serving.evaluation.datasets import Example

TEXT = "The gate opened in March. Bread costs two coins. The keeper sleeps."


def example(id="q", document="d", **fields) -> Example:
    given = {"task": "t", "text": TEXT, "question": "When?", "answers": ("in March",), "metric": "f1"} | fields
    return Example(id=id, document=document, **given)
