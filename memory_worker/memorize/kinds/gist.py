"""`gist`: the model itself condenses every 4096 tokens, and the memory is what it has read of these gists.

The lite mode: any decoder can do it, at the cost of writing the gists. They are greedy, a group of windows at a time,
and the Memorizer's own model writes them: a job that was killed goes on with the same groups, so with the same gists.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from cluster.planning.costs import GIST_WINDOW
from memory_worker.messages import Language
from memory_worker.models.prompts import gist_frame

if TYPE_CHECKING:
    from torch import Tensor

    from memory_worker.models.beacon import Part, Slots
    from memory_worker.models.stock import MemoryModel


class GistEncoder:
    """See `kinds.encoder.Encoder`. A window that is no longer than a gist may be stays as it is."""

    window = GIST_WINDOW
    ratios = (2, 4, 8, 16, 32)
    ranks = 1  # what is to be read is known only when it has been written
    together = 1
    checkpoint_windows = 1  # writing gists takes far longer than making them durable

    def __init__(self, model: "MemoryModel", tokenizer: Any) -> None:
        self._model = model
        self._end: list[int] = tokenizer.encode("\n", add_special_tokens=False)  # after each gist, so none is empty
        self._frames = {
            (language, ratio): gist_frame(tokenizer, language, GIST_WINDOW // ratio)
            for language in get_args(Language)
            for ratio in self.ratios
        }
        self._special = {*tokenizer.all_special_ids}
        self._stop = {*_ends_of(model.folder)} | ({tokenizer.eos_token_id} - {None})

    def encode(
        self,
        documents: "Sequence[Tensor]",
        *,
        ratio: int,
        language: Language,
        memory: "Sequence[Slots]",
        group_windows: int,
    ) -> "Iterator[tuple[Part, ...]]":
        from memory_worker.models.beacon import Part, Slots

        windows = [
            (number, text[start : start + self.window])
            for number, text in enumerate(documents)
            for start in range(0, len(text), self.window)
        ]
        left = [len(text) for text in documents]  # tokens
        before = [*memory]
        for first in range(0, len(windows), group_windows):
            group = windows[first : first + group_windows]
            gists = self._gists([text for _, text in group], ratio, language)
            together: dict[int, list[int]] = defaultdict(list)  # the gists of each document, one after another
            tokens: dict[int, int] = defaultdict(int)
            for (number, text), gist in zip(group, gists, strict=True):
                together[number] += gist
                tokens[number] += len(text)
            read = self._read([*together.values()], [before[number] for number in together])
            parts = []
            for number, slots in zip(together, read, strict=True):
                left[number] -= tokens[number]
                parts.append(Part(number, tokens[number], slots, not left[number]))
                if left[number]:
                    before[number] = Slots.concat([before[number].to(slots.keys.device), slots])
            yield tuple(parts)

    def _gists(self, texts: "Sequence[Tensor]", ratio: int, language: Language) -> list[list[int]]:
        """The tokens of each text's gist, or of the text itself where that is not longer."""
        most = self.window // ratio
        before, after = self._frames[language, ratio]
        long = [text.tolist() for text in texts if len(text) > most]
        written = iter(
            self._model.generate_each(
                [[*before, *text, *after] for text in long], max_new_tokens=most - len(self._end), stop=self._stop
            )
        )
        return [
            text.tolist()
            if len(text) <= most
            else [*(token for token in next(written) if token not in self._special), *self._end]
            for text in texts
        ]

    def _read(self, gists: list[list[int]], memory: "Sequence[Slots]") -> "list[Slots]":
        """The slots of each, which follows its own of `memory`."""
        from memory_worker.models.beacon import Slots

        slots: list[list[Slots]] = [[] for _ in gists]
        for group in self._model.compress_documents(gists, ratio=None, memory=memory):
            for part in group:
                slots[part.document].append(part.slots)
        return [Slots.concat(parts) for parts in slots]


def _ends_of(folder: Path) -> list[int]:
    """The tokens at which the checkpoint's own settings end what it writes."""
    file = folder / "generation_config.json"
    ends = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    return [] if ends is None else [ends] if isinstance(ends, int) else [*ends]
