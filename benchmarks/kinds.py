"""What every kind of memory keeps of a text, at every ratio: by how likely the model finds evidence and answers.

For each question about a text, the log-loss of a token of the sentence that holds the answer, and of the answer, is
taken behind the memory and the question. With nothing but the head before the question it is highest, with a full
memory lowest; the **share kept** is how much of that way a memory goes:

    share = (loss with nothing - loss with the memory) / (loss with nothing - loss with the full memory)

The model, its kinds and prompts are the server's own; the engine is not run, which continues a memory with the same
tokens (`tests/memory_worker/memorize/test_kinds.py`). Intervals are of 95 %, by a bootstrap over texts. The data is one
file of documents as `memorag evaluate` reads them.
"""

import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

from benchmarks.report import make_parser, report, say
from cluster.planning.costs import MemoryKind
from memory_worker.models.prompts import PromptKind, head_tokens, question_tokens
from serving.evaluation.bootstrap import interval
from serving.evaluation.datasets import Example, read_examples

LONGEST_SENTENCE = 48  # tokens of evidence
KINDS_ASKED: tuple[PromptKind, PromptKind] = ("span", "answer")


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, and what should be recalled: token ids."""

    document: str
    quoted: tuple[list[int], list[int]]  # the question with its instruction; the sentence with the answer
    answered: tuple[list[int], list[int]]


@dataclass(frozen=True, slots=True)
class Kept:
    """What one memory is worth for one question."""

    evidence_loss: float  # nats a token
    evidence_likeliest: float  # share of tokens
    answer_loss: float


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--model", type=Path, required=True, help="folder of a Qwen2, Qwen3, Mistral or Llama checkpoint"
    )
    parser.add_argument("--data", type=Path, required=True, help="documents with questions, evidence and answers")
    parser.add_argument("--texts", type=int, default=20, help="how many texts are read, the first that have questions")
    parser.add_argument("--questions", type=int, default=10, help="of each text at most")
    parser.add_argument("--characters", type=int, default=6000, help="of each text")
    parser.add_argument("--kinds", nargs="+", choices=get_args(MemoryKind), help="all that the model can make")
    options = parser.parse_args()
    rows = measure(
        options.model,
        read_examples(options.data),
        texts=options.texts,
        questions=options.questions,
        characters=options.characters,
        kinds=options.kinds,
    )
    ratios = {f"share_{row['kind']}_{row['ratio']}": row["evidence kept"] for row in rows if row["kind"] != "nothing"}
    report("kinds", rows, ratios, options.json)


def measure(
    folder: Path,
    examples: Sequence[Example],
    *,
    texts: int,
    questions: int,
    characters: int,
    kinds: Sequence[MemoryKind] | None = None,
) -> list[dict[str, Any]]:
    """A row for nothing, for the full memory, and for each other of `kinds` at each of its ratios."""
    import torch
    from transformers import AutoTokenizer

    from memory_worker.memorize.kinds.encoder import encoders
    from memory_worker.models.beacon import BeaconModel, Slots

    model, tokenizer = BeaconModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    made = encoders(model, None, tokenizer, room=2**30)
    wanted: list[tuple[MemoryKind, int]] = [("full", 1)]
    wanted += [(kind, ratio) for kind in kinds or made if kind != "full" for ratio in made[kind].ratios]
    found: dict[tuple[str, int], list[Kept]] = defaultdict(list)
    seconds: dict[tuple[str, int], float] = defaultdict(float)
    sizes: dict[tuple[str, int], int] = defaultdict(int)
    names: list[str] = []
    for document, own in groupby(examples, key=lambda example: example.document):
        if len(set(names)) == texts:
            break
        of_text = [*own]
        asked = [*_asked(tokenizer, of_text, characters)][:questions]
        if not asked:
            continue
        text, language = of_text[0].text[:characters], of_text[0].language
        ((head,),) = model.compress_documents([head_tokens(tokenizer, language)], ratio=None)
        ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.int32)
        say(f"{document}: {len(ids):,} tokens, {len(asked)} questions")
        names += [one.document for one in asked]
        found["nothing", 0] += [_kept(model, head.slots, one) for one in asked]
        for kind, ratio in wanted:
            began = time.perf_counter()
            parts = made[kind].encode([ids], ratio=ratio, language=language, memory=[head.slots], group_windows=4)
            slots = Slots.concat([head.slots, *(part.slots for group in parts for part in group)])
            seconds[kind, ratio] += time.perf_counter() - began
            sizes[kind, ratio] += slots.bytes
            found[kind, ratio] += [_kept(model, slots, one) for one in asked]
    if not names:
        raise SystemExit("no text of the data has a question whose evidence is within it: give more --characters")
    nothing, full = found["nothing", 0], found["full", 1]
    return [
        _row(*made_as, kept, nothing, full, names) | {"bytes": sizes[made_as], "memorize s": round(seconds[made_as], 1)}
        for made_as, kept in found.items()
    ]


def _row(
    kind: str, ratio: int, kept: Sequence[Kept], nothing: Sequence[Kept], full: Sequence[Kept], names: Sequence[str]
) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": kind, "ratio": ratio, "questions": len(kept)}
    for what, losses in (
        ("evidence", [[one.evidence_loss for one in those] for those in (kept, nothing, full)]),
        ("answer", [[one.answer_loss for one in those] for those in (kept, nothing, full)]),
    ):
        ours, worst, best = losses
        way = (sum(worst) - sum(best)) / len(worst)
        share = interval([(without - loss) / way for loss, without in zip(ours, worst, strict=True)], names)
        row[f"{what} log-loss"] = round(sum(ours) / len(ours), 3)
        row[f"{what} kept"] = round(share.mean, 3)
        row[f"{what} 95 %"] = "" if share.low is None else f"{share.low:.2f} to {share.high:.2f}"
    row["likeliest"] = round(sum(one.evidence_likeliest for one in kept) / len(kept), 3)
    return row


def _kept(model: Any, memory: Any, asked: Asked) -> Kept:
    evidence_loss, likeliest = _loss(model, memory, *asked.quoted)
    return Kept(evidence_loss, likeliest, _loss(model, memory, *asked.answered)[0])


def _loss(model: Any, memory: Any, prompt: list[int], target: list[int]) -> tuple[float, float]:
    """Log-loss of a token of `target` behind `memory` and `prompt`, and the share of them that are the likeliest."""
    import torch

    logits = model.logits([*prompt, *target[:-1]], memory)[len(prompt) - 1 :]
    ids = torch.tensor(target, device=logits.device)
    loss = torch.nn.functional.cross_entropy(logits, ids)
    return float(loss), float((logits.argmax(dim=-1) == ids).float().mean())


def _asked(tokenizer: Any, examples: Sequence[Example], characters: int) -> Iterator[Asked]:
    """Questions whose evidence lies within the text as far as it is read, and says the answer."""
    for example in examples:
        if not example.evidence or not example.answers or example.evidence[0][1] > characters:
            continue
        start, end = example.evidence[0]
        sentences = re.split(r"(?<=[.!?。！？])\s*", example.text[start:end].strip())
        sentence = next((one for one in sentences if example.answers[0] in one), "")
        if not sentence:
            continue
        quote, answer = (question_tokens(tokenizer, kind, example.question, example.language) for kind in KINDS_ASKED)
        said = tokenizer.encode(sentence, add_special_tokens=False)[:LONGEST_SENTENCE]
        right = tokenizer.encode(example.answers[0], add_special_tokens=False)
        yield Asked(example.document, (quote, said), (answer, right))


if __name__ == "__main__":
    main()
