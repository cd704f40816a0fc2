"""Asks a server every question of a dataset by every method: called by `memorag evaluate`.

Each text is memorized once, under a name made of it, however many questions are on it and however often the run is
taken up. All questions on a text are asked before the next text is memorized.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

from serving.batch.memorize import memorize_once
from serving.batch.progress import OnCount
from serving.client.client import MemoRAG, Memory
from serving.evaluation.datasets import Example
from serving.evaluation.methods import Method, answer_row
from serving.evaluation.run import Run

TAG = "evaluation"


def sample(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """At most `limit` examples, evenly spread: the same ones each time, questions on a text side by side."""
    if limit is not None and limit < len(examples):
        examples = [examples[place * len(examples) // limit] for place in range(limit)]
    order = {document: place for place, document in enumerate(dict.fromkeys(each.document for each in examples))}
    return sorted(examples, key=lambda example: order[example.document])


def ask_all(
    client: MemoRAG,
    run: Run,
    examples: Sequence[Example],
    methods: Sequence[Method],
    *,
    max_tokens: int,
    concurrency: int,
    cited: bool = False,
    show: OnCount = lambda done, total, before: None,
) -> None:
    """Asks what the run lacks; `show` is told how many of all questions × methods are done, and were before.

    Raises `ServerUnreachable` where the server is gone; what was answered is recorded.
    """
    total = len(examples) * len(methods)
    done = before = total - sum(run.lacks(example, method) for example in examples for method in methods)
    show(done, total, before)
    with ThreadPoolExecutor(concurrency) as threads:
        for _, group in groupby(examples, key=lambda example: example.document):
            wanted = [(example, method) for example in group for method in methods if run.lacks(example, method)]
            if not wanted:
                continue
            text = wanted[0][0]
            memory, _ = memorize_once(client, f"evaluation-{text.document}", text=text.text, tags=[TAG])

            def ask(pair: tuple[Example, Method], memory: Memory = memory) -> None:
                run.record(answer_row(memory, *pair, max_tokens=max_tokens, cited=cited))

            for _ in threads.map(ask, wanted):
                done += 1
                show(done, total, before)
