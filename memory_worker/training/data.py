"""Examples from files and generators: texts to read, and what is asked of them.

The examples of a step depend on the run's seed and on the step alone, so a resumed run sees what an uninterrupted
one would have seen.
"""

import importlib
import json
import lzma
import random
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from memory_worker.models.prompts import head_tokens, question_tokens
from memory_worker.training.config import DataConfig, StageConfig, TrainingError
from memory_worker.training.layout import Layout
from memory_worker.training.model import Batch

_NOT_SAID = ("The text does not say.", "文本中没有提到。")  # as the prompts of `answer` ask for it
_KEY_POINTS = 6  # at most
_OF_MEMORY = ("span", "question", "draft", "answer")
_TEXT, _QUESTION = "\ue0f2", "\ue0f3"  # private-use characters, which no chat template contains or changes


@dataclass(slots=True)
class Example:
    """A text and what follows it."""

    head: list[int]  # instruction tokens before the text, kept raw
    text: list[int]
    tails: list[tuple[list[int], int]] = field(default_factory=list)  # tokens, and how many of them are the prompt


class Source:
    """One source of examples, from files read into memory once, or from a generator."""

    def __init__(self, config: DataConfig, tokenizer: Any) -> None:
        self.config = config
        self._tokenizer = tokenizer
        self._end = [tokenizer.eos_token_id]
        self._heads: dict[str, list[int]] = {}
        self._questions: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        if bool(config.files) == bool(config.generator):
            raise TrainingError("a source of data has either `files` or a `generator`: give one of them")
        self._make = import_function(config.generator) if config.generator else None
        self._records = (
            [] if self._make else sorted(records(config.files), key=lambda record: len(record.get("text", "")))
        )
        if not self._make and not self._records:
            raise TrainingError(f"there is nothing in {', '.join(config.files)}: name files that hold texts")

    def examples(self, draw: random.Random, count: int, stage: StageConfig, tokens: int) -> list[Example]:
        """`count` examples with `stage.questions` questions each; texts of at most `tokens` tokens."""
        if self._make:
            records = self._make(draw.randrange(2**60), count, **self.config.arguments)
        elif self.config.kind == "conversations":
            records = draw.choices(self._records, k=count)
        else:
            records = self._alike(draw, count)
        if self.config.kind == "conversations":
            return [self._conversations(draw, record, stage) for record in records]
        encoded = self._encode([record["text"] for record in records])
        tokens = min(
            tokens, *(len(ids) + len(self._before(record)) for record, (ids, _) in zip(records, encoded, strict=True))
        )
        made = []
        for record, (ids, starts) in zip(records, encoded, strict=True):
            if self.config.kind == "text":
                begin = draw.randrange(max(1, len(ids) - tokens + 1))
                made.append(Example([], ids[begin : begin + tokens]))
            else:
                made.append(self._ask(draw, record, ids, starts, 2 * stage.questions, tokens))
        _keep_half(draw, made)
        return made

    def _alike(self, draw: random.Random, count: int) -> list[dict[str, Any]]:
        """Records of like lengths: all texts of a batch are cut to the shortest."""
        near = min(len(self._records), 4 * count)
        first = draw.randrange(len(self._records) - near + 1)
        return draw.choices(self._records[first : first + near], k=count)

    def _before(self, record: dict[str, Any]) -> list[int]:
        """The head of a record's text."""
        if self.config.kind == "text":
            return []
        if "frame" in record:
            return self._ids(self._render_frame(record["frame"])[0])
        return self._head(record.get("language", "en"))

    def _ask(
        self, draw: random.Random, record: dict[str, Any], ids: list[int], starts: list[int], count: int, tokens: int
    ) -> Example:
        """A stretch of a document that holds the evidence of some question, and questions on it."""
        language = record.get("language", "en")
        frame = self._render_frame(record["frame"]) if "frame" in record else None
        head = self._before(record)
        room = tokens - len(head)
        questions = record.get("questions", [])
        begin = 0
        if len(ids) > room and questions:
            spans = _spans(draw.choice(questions))
            at = bisect_right(starts, spans[0][0]) - 1 if spans else draw.randrange(len(ids))
            begin = min(max(0, at - draw.randrange(room)), len(ids) - room)
        example = Example(head, ids[begin : begin + room])
        first, last = starts[begin], starts[min(begin + room, len(ids))]
        inside = [q for q in questions if all(first <= a and b <= last for a, b in _spans(q))]
        # With an `unknown` of 0 nothing is drawn for it: what earlier runs saw is what they see again.
        unread = [
            q
            for q in questions
            if self.config.unknown and not frame and _spans(q) and all(b <= first or last <= a for a, b in _spans(q))
        ]
        tasks, shares = zip(*self.config.tasks.items(), strict=True)
        for task in draw.choices(tasks, shares, k=count):
            if unread and task in _OF_MEMORY and draw.random() < self.config.unknown:
                example.tails.append(self._tail(task, draw.choice(unread), language, record["text"], read=False))
            elif task == "recite" or not inside:
                example.tails.append(_recite(draw, example.text))
            elif task == "key_point":
                example.tails.append(self._key_points(draw, inside, language, record["text"]))
            elif frame:
                question = draw.choice(inside)
                asked = self._ids(f"{frame[1]}{question['question']}{frame[2]}")
                wanted = self._ids(f"{self.config.lead}{question['answers'][0]}")
                example.tails.append(([*asked, *wanted, *self._end], len(asked)))
            else:
                example.tails.append(self._tail(task, draw.choice(inside), language, record["text"]))
        example.tails = [*{tuple(ids): (ids, prompt) for ids, prompt in example.tails}.values()]  # each once
        return example

    def _tail(
        self, task: str, question: dict[str, Any], language: str, text: str, read: bool = True
    ) -> tuple[list[int], int]:
        """The tokens of one question and what is to be written, and how many of them are the question.

        Of what was not `read` there is nothing to recall, and an answer says that the text does not say.
        """
        before, after = self._frame(task, language)
        asked = [*before, *self._ids(question["question"]), *after]
        lead = self.config.lead
        if not read:
            wanted = f"{lead}{_NOT_SAID[language == 'zh']}" if task == "answer" else ""
        elif task == "span":
            clues = question.get("clues") or [text[a:b] for a, b in _spans(question)] or question["answers"][:1]
            wanted = "\n".join(f"{lead}{clue}" for clue in clues)
        elif task == "question":
            wanted = f"{lead}{question.get('surrogate') or question['question']}"
        else:
            wanted = f"{lead}{question['answers'][0]}"
        return [*asked, *self._ids(wanted), *self._end], len(asked)

    def _key_points(
        self, draw: random.Random, inside: list[dict[str, Any]], language: str, text: str
    ) -> tuple[list[int], int]:
        """The evidence of some questions, in the text's order: what people ask about are its points."""
        asked = question_tokens(self._tokenizer, "key_point", "", "zh" if language == "zh" else "en")
        spans = sorted({tuple(span) for question in inside for span in _spans(question)})
        chosen = sorted(draw.sample(spans, min(_KEY_POINTS, len(spans))))
        lines = "\n".join(f"{self.config.lead}{' '.join(text[a:b].split())}" for a, b in chosen)
        return [*asked, *self._ids(lines), *self._end], len(asked)

    def _conversations(self, draw: random.Random, record: dict[str, Any], stage: StageConfig) -> Example:
        """One conversation, or several that are `shared`: the tokens that all begin with are the text, read once."""
        if "shared" not in record:
            return Example([], [], [self._conversation(record)])
        if stage.texts > 1:
            raise TrainingError(
                "conversations that share their beginning are read one at a time: set the stage's texts: 1"
            )
        chosen = draw.sample(record["shared"], min(stage.questions, len(record["shared"])))
        tails = [self._conversation(each) for each in chosen]
        length = min(prompt for _, prompt in tails) - 1
        text = [
            *map(
                itemgetter(0),
                takewhile(lambda t: len({*t}) == 1, zip(*(ids[:length] for ids, _ in tails), strict=True)),
            )
        ]
        if len(text) > stage.tokens:
            raise TrainingError(f"conversations begin alike for {len(text)} tokens: raise the stage's tokens to that")
        return Example([], text, [(ids[len(text) :], prompt - len(text)) for ids, prompt in tails])

    def _conversation(self, record: dict[str, Any]) -> tuple[list[int], int]:
        """A conversation whose last message is the reply; what comes before is the prompt: how many tokens that is."""
        *before, reply = record["messages"]
        if reply["role"] != "assistant" or not before:
            raise TrainingError("a conversation ends with a message of the role assistant, after one of the user")
        prompt = self._tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
        asked = self._tokenizer.encode(prompt, add_special_tokens=False)
        return [*asked, *self._ids(f"{self.config.lead}{reply['content'].strip()}"), *self._end], len(asked)

    def _encode(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Token ids, and for each the character that it begins at, with the text's length at the end."""
        rust = self._tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [
            (encoding.ids, [*(start for start, _ in encoding.offsets), len(text)])
            for encoding, text in zip(rust, texts, strict=True)
        ]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _head(self, language: str) -> list[int]:
        if language not in self._heads:
            self._heads[language] = head_tokens(self._tokenizer, "zh" if language == "zh" else "en")
        return self._heads[language]

    def _render_frame(self, frame: dict[str, str]) -> list[str]:
        """What stands before the text, between text and question, and after it, in a chat."""
        content = f"{frame['before']}{_TEXT}{frame['between']}{_QUESTION}"
        messages = [{"role": "user", "content": content}]
        prompt = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, rest = prompt.split(_TEXT)
        return [before, *rest.split(_QUESTION)]

    def _frame(self, task: str, language: str) -> tuple[list[int], list[int]]:
        """What stands before and after a question."""
        if (task, language) not in self._questions:
            tokens = question_tokens(self._tokenizer, task, _QUESTION, "zh" if language == "zh" else "en")  # type: ignore[arg-type]
            inner = self._tokenizer.encode(_QUESTION, add_special_tokens=False)
            at = next(i for i in range(len(tokens)) if tokens[i : i + len(inner)] == inner)
            self._questions[task, language] = tokens[:at], tokens[at + len(inner) :]
        return self._questions[task, language]


def batches(
    sources: Sequence[Source], stage: StageConfig, window: int, seed: int, step: int, rank: int, ranks: int
) -> Iterator[Batch]:
    """The `stage.accumulate` batches of one step on one worker."""
    for part in range(stage.accumulate):
        shared = random.Random(f"{seed} {stage.name} {step} {part}")  # ranks compress alike, so none waits
        source = shared.choices(sources, [source.config.share for source in sources])[0]
        tokens = shared.randint(stage.least_tokens or stage.tokens, stage.tokens)
        ratios = [shared.choice(stage.ratios) for _ in range(-(-tokens // window))]
        draw = random.Random(f"{seed} {stage.name} {step} {part} {rank} of {ranks}")
        examples = source.examples(draw, stage.texts, stage, tokens)
        yield collate(examples, window, [0] if source.config.raw else ratios, stage.text_loss)


def collate(examples: Sequence[Example], window: int, ratios: Sequence[int], text_loss: float) -> Batch:
    """One batch of one layout: texts are cut to the shortest, tails are filled up to the longest."""
    head = min(len(example.head) for example in examples)
    length = min(len(example.text) for example in examples)
    text = torch.tensor([[*example.head[:head], *example.text[:length]] for example in examples], dtype=torch.int64)
    weights = torch.full(text.shape, text_loss)
    weights[:, :head] = 0
    count = max(len(example.tails) for example in examples)
    longest = max((len(ids) for example in examples for ids, _ in example.tails), default=0)
    tails = torch.zeros(len(examples), count, longest, dtype=torch.int64)
    tail_weights = torch.zeros(tails.shape)
    for i, example in enumerate(examples):
        for j, (ids, prompt) in enumerate(example.tails):
            tails[i, j, : len(ids)] = torch.tensor(ids)
            tail_weights[i, j, prompt : len(ids)] = 1
    layout = Layout.cut(head, head + length, window, ratios, count, longest)
    return Batch(layout, text, weights, tails, tail_weights)


def _keep_half(draw: random.Random, examples: Sequence[Example]) -> None:
    """Keeps the shorter half of each example's tails, or the longer one: less is filled up, and none is favoured."""
    longer = draw.random() < 0.5
    for example in examples:
        tails = sorted(example.tails, key=lambda tail: len(tail[0]), reverse=longer)
        example.tails = tails[: -(-len(tails) // 2)]  # of a single one, that one


def _recite(draw: random.Random, text: list[int], prompt: int = 4, length: int = 16) -> tuple[list[int], int]:
    """A piece of the text, to be gone on with after its first tokens."""
    start = draw.randrange(max(1, len(text) - prompt - length))
    piece = text[start : start + prompt + length]
    return piece, min(prompt, len(piece) - 1)


def _spans(question: dict[str, Any]) -> list[list[int]]:
    """The offsets of all that a question rests on."""
    return [*question.get("bridge", []), *question.get("evidence", [])]


def records(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What is in text and JSON Lines files; a text file is one record with its `text`."""
    for name in files:
        path = Path(name)
        if not path.is_file():
            raise TrainingError(f"there is no file {name}: correct `files` in the run")
        if ".jsonl" not in path.name:
            yield {"text": path.read_text("utf-8")}
            continue
        with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as lines:
            for line in lines:
                if line.strip():
                    yield json.loads(line)


def import_function(name: str) -> Any:
    """The function that `module:function` names; modules in the working directory are found, too."""
    module, _, function = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise TrainingError(f"the generator {name} cannot be imported ({error}); write it as module:function") from None
