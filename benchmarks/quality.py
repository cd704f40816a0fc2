"""Retrieval by vectors, by words and by both, on questions whose answer or evidence in the text is known.

The texts are cut, embedded and indexed by the server's own parts, with the settings of a profile; no language model is
asked. For each dataset:

    answer@k      an answer stands, word for word, in one of the first k passages; of questions with such an answer
    evidence@k    the share of the question's evidence that the first k passages touch

with 95 % intervals of the differences between both and each part, paired, over texts.

    python -m benchmarks.quality FILE … [--characters 600] [--profile embedded] [--limit 1200] [--json OUT]
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.report import make_parser, report
from retrieval_worker.config import IndexConfig, PassageConfig, RetrievalConfig
from retrieval_worker.embedders import EmbedderModel, load_embedder
from retrieval_worker.index import PassageIndex
from retrieval_worker.messages import EmbedderDescription
from retrieval_worker.passages import cut
from retrieval_worker.vectors import PassageVectors
from serving.config import load_profile
from serving.evaluation.bootstrap import difference, interval
from serving.evaluation.datasets import Example, read_examples
from serving.evaluation.evaluate import sample
from serving.evaluation.recall import Found, answer_recall, evidence_recall

KS = (1, 3, 5)
WEIGHTS = {"vectors": 1.0, "words": 0.0, "both": IndexConfig().dense_weight}
Values = dict[str, dict[str, float]]  # by figure, then by example


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--profile", default="embedded")
    parser.add_argument("--characters", type=int, help="of a passage; else the profile's")
    parser.add_argument("--limit", type=int, default=1200, help="questions of one file, evenly spread")
    arguments = parser.parse_args()
    config = load_profile(arguments.profile).retrieval
    characters = arguments.characters or config.passages.max_characters
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for file in arguments.files:
        examples = sample(read_examples(file), arguments.limit)
        found = _score(examples, config, characters)
        documents = {example.id: example.document for example in examples}
        name = file.name.split(".")[0]
        for ranking, values in found.items():
            row: dict[str, Any] = {"dataset": name, "ranking": ranking, "n": len(next(iter(values.values())))}
            rows.append(row | {figure: interval(*_lists(each, documents)).mean for figure, each in values.items()})
        for part in ("vectors", "words"):
            for figure, each in found["both"].items():
                gain = difference(list(each.values()), *_lists(found[part][figure], documents))
                for which, value in (("mean", gain.mean), ("low", gain.low), ("high", gain.high)):
                    ratios[f"{name}: both - {part}, {figure}, {which}"] = value or 0.0
    report(f"quality ({characters} characters)", rows, ratios, arguments.json)


def _score(examples: Sequence[Example], config: RetrievalConfig, characters: int) -> dict[str, Values]:
    """Every figure of every example by every ranking."""
    values: dict[str, Values] = {ranking: {} for ranking in WEIGHTS}
    for ranking, example, best_first in _rankings(examples, config, characters):
        for k in KS:
            for name, recall in (("answer", answer_recall), ("evidence", evidence_recall)):
                if (share := recall(example, best_first, k)) is not None:
                    values[ranking].setdefault(f"{name}@{k}", {})[example.id] = share
    return values


def _rankings(
    examples: Sequence[Example], config: RetrievalConfig, characters: int
) -> Iterator[tuple[str, Example, list[Found]]]:
    model = load_embedder(config.embedder)
    for asked, document in documents(
        examples, model, config.passages.model_copy(update={"max_characters": characters})
    ):
        queries = model.encode([model.query_prompt + example.question for example in asked])
        for ranking, weight in WEIGHTS.items():
            index = document.index(config.index.model_copy(update={"dense_weight": weight}))
            for row, example in enumerate(asked):
                hits = index.search(example.question, queries, row, config.search.hits_per_query)
                yield ranking, example, [Found(*document.slices[passage], score) for passage, score in hits]


@dataclass(frozen=True)
class Document:
    """A text's passages and their vectors."""

    slices: list[tuple[int, int]]
    texts: list[str]
    vectors: PassageVectors
    embedder: EmbedderDescription

    def index(self, config: IndexConfig) -> PassageIndex:
        return PassageIndex.build([self.vectors], self.texts, self.embedder, config)


def documents(
    examples: Sequence[Example], model: EmbedderModel, config: PassageConfig
) -> Iterator[tuple[list[Example], Document]]:
    """Each text, cut and embedded once, with the examples that ask of it."""
    described = EmbedderDescription("here", model.dimension, model.has_sparse, model.max_tokens)
    for _, group in groupby(examples, key=lambda example: example.document):
        asked = list(group)
        text = asked[0].text
        slices = cut(text, config.max_characters, config.overlap_characters)
        texts = [text[start:end] for start, end in slices]
        vectors = PassageVectors.of(model.encode([model.passage_prompt + each for each in texts]))
        yield asked, Document(slices, texts, vectors, described)


def _lists(values: dict[str, float], documents: dict[str, str]) -> tuple[list[float], list[str]]:
    return list(values.values()), [documents[id] for id in values]


if __name__ == "__main__":
    main()
