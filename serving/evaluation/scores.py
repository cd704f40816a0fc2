"""What an answer is worth: the field's metrics, each 0 to 1, the best over all right answers.

F1 is SQuAD's (transformers), as LongBench and the MemoRAG paper use it; ROUGE-L is `rouge-score`'s F-measure, as L-Eval
and InfiniteBench use it (LongBench's own comes from another package and differs in the third digit). Chinese is cut
into words by jieba for both, as in LongBench. Citations `[n]` are taken out of an answer first.
"""

import functools
import re
import tempfile
from typing import Any

from generator_worker.citations import strip_citations
from serving.evaluation.datasets import Example

_LETTERS = r"(?<![A-Za-z])([A-D](?:[\s,、和&]*[A-D])*)(?![A-Za-z])"
_NAMED_CHOICE = re.compile(r"(?i:answers?|options?|choices?|选项|答案)(?i:\s|is|are|:|：|是|为|\(|（|\*)*" + _LETTERS)
_FIRST_CHOICE = re.compile(_LETTERS)


def score(example: Example, answer: str) -> float:
    """The example's metric of `answer`."""
    said = strip_citations(answer).strip()
    if example.metric == "class":
        return max(_class(said, right, example.classes) for right in example.answers)
    if example.metric == "rouge-l":
        return _rouge(said, example)
    measure = {"f1": _f1, "choice": _choice, "contains": _contains}[example.metric]
    return max((measure(said, right, example.language) for right in example.answers), default=0.0)


def exact(example: Example, answer: str) -> float:
    """1 where an answer is right word for word, but for case, punctuation and articles (SQuAD)."""
    from transformers.data.metrics.squad_metrics import compute_exact

    said = _space(strip_citations(answer).strip(), example.language)
    return float(max((compute_exact(_space(right, example.language), said) for right in example.answers), default=0))


def _f1(said: str, right: str, language: str) -> float:
    from transformers.data.metrics.squad_metrics import compute_f1

    return float(compute_f1(_space(right, language), _space(said, language)))


def _rouge(said: str, example: Example) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_ChineseWords() if example.language == "zh" else None)
    return float(scorer.score_multi(example.answers, said)["rougeL"].fmeasure)


def _choice(said: str, right: str, language: str) -> float:
    """Whether the letters chosen are the right ones; of an explanation, those it names as its answer, or first."""
    found = _NAMED_CHOICE.search(said) or _FIRST_CHOICE.search(said)
    return float(found is not None and _letters(found.group(1)) == _letters(right))


def _letters(text: str) -> set[str]:
    return set(re.findall("[A-D]", text.upper()))


def _contains(said: str, right: str, language: str) -> float:
    """Whether the right words stand in what was said, in order (InfiniteBench's retrieval tasks)."""
    said, right = (" ".join(re.findall(r"\w+", text.casefold())) for text in (said, right))
    return float(f" {right} " in f" {said} ")


def _class(said: str, right: str, classes: tuple[str, ...]) -> float:
    """LongBench's: the classes that the first line names share the point."""
    line = said.split("\n")[0]
    named = [name for name in classes if name in line and not (name in right and name != right)]
    return 1 / len(named) if right in named else 0.0


class _ChineseWords:
    """A tokenizer for `rouge-score`."""

    def tokenize(self, text: str) -> list[str]:
        return _words(text)


def _space(text: str, language: str) -> str:
    return " ".join(_words(text)) if language == "zh" else text


def _words(text: str) -> list[str]:
    return [word.lower() for word in _jieba().lcut(text) if any(character.isalnum() for character in word)]


@functools.cache
def _jieba() -> Any:
    import logging

    import jieba

    jieba.setLogLevel(logging.WARNING)
    cutter = jieba.Tokenizer()
    # It keeps its dictionary in a file that it reads back as it lies there: never from a folder others may write to.
    with tempfile.TemporaryDirectory() as cutter.tmp_dir:
        cutter.initialize()
    return cutter
