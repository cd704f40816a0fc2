"""`pruned`: the text is read as for `full`, and of every window the pairs that repeating it needs most are kept.

How much a pair is needed is KVzip's score (arXiv 2505.23416): the model is told to repeat what it has read, a stretch
at a time, and the most attention that any token of the repetition pays to the pair counts. No question is known. Each
KV head keeps its own pairs: as many as it needs of those that the heads of a layer may keep together (AdaKV, arXiv
2407.11550), where the engine can serve that, else all equally many. A kept pair goes on standing where it stood in the
text, counted from the window's end: slots are numbered closely, and a key is stored turned by the difference.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, get_args

from cluster.planning.costs import PRUNED_RATIOS, REPEATED_TOKENS, pruned_window
from memory_worker.head_pools import POOL_BLOCK, Counts, pack
from memory_worker.messages import Language
from memory_worker.models.prompts import head_tokens, repeat_frames

if TYPE_CHECKING:
    from torch import Tensor

    from memory_worker.models.beacon import Part, Repetition, Slots
    from memory_worker.models.beacon.rope import Rope
    from memory_worker.models.stock import MemoryModel

_LAST_TOKENS = 8  # of the stretch before, by which the model is told where to go on


class PrunedEncoder:
    """See `kinds.encoder.Encoder`.

    A window is read behind as many of the slots before it as the model can see; where heads share their slots, behind
    the memory's head alone, as a segment is: a pass has as many slots of every head.
    """

    ratios = PRUNED_RATIOS
    ranks = 1  # what is kept of a window is known only when all of it has been read and repeated
    checkpoint_windows = 1  # windows are long, and are read twice

    def __init__(
        self, model: "MemoryModel", tokenizer: Any, *, room: int, positions: int | None, together: int = 1
    ) -> None:
        """`room`: slots that a prompt of the engine may hold; `positions`: those that the model was trained for;
        `together`: KV heads of a layer that share their slots."""
        self._model = model
        self.together = together
        self._heads = {language: len(head_tokens(tokenizer, language)) for language in get_args(Language)}
        self._frames = {language: repeat_frames(tokenizer, language) for language in get_args(Language)}
        told = max(max(len(first), len(before) + len(after)) for first, before, after in self._frames.values())
        self._repetition = told + _LAST_TOKENS + REPEATED_TOKENS  # tokens, at most
        head = max(self._heads.values())
        self.window = pruned_window(model.window)  # half of it as often as it takes to fit
        while all(self.window // 2 % ratio == 0 for ratio in self.ratios) and (
            head + self.window // min(self.ratios) > room
            or (positions and head + self.window + self._repetition > positions)
        ):
            self.window //= 2
        self._positions = positions

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

        for number, (text, slots) in enumerate(zip(documents, memory, strict=True)):
            before = slots if self.together == 1 else slots.cut(0, self._heads[language])
            for start in range(0, len(text), self.window):
                window = text[start : start + self.window]
                read, scores = self._model.read_scored(
                    window, memory=self._seen(before, language), repetitions=self._repetitions(window, language)
                )
                count = -(-len(window) // ratio)
                kept, dropped, counts = prune(read, scores, count, self._model.rope, together=self.together)
                last = start + len(window) == len(text)
                yield (Part(number, len(window), kept, last, dropped, counts),)
                if not last and self.together == 1:
                    before = Slots.concat([before.to(kept.keys.device), kept])

    def _seen(self, before: "Slots", language: Language) -> "Slots":
        """Of the head and the slots after it, the head and the last that leave positions for a window."""
        from memory_worker.models.beacon import Slots

        head = self._heads[language]
        if not self._positions:
            return before
        room = max(0, self._positions - head - self.window - self._repetition)
        first = max(head, len(before) - room)
        return Slots.concat([before.cut(0, head), before.cut(first, len(before))])

    def _repetitions(self, text: "Tensor", language: Language) -> "list[Repetition]":
        import torch

        from memory_worker.models.beacon import Repetition

        first, before, after = (torch.tensor(frame, dtype=text.dtype) for frame in self._frames[language])
        repetitions = []
        for start in range(0, len(text), REPEATED_TOKENS):
            end = min(start + REPEATED_TOKENS, len(text))
            told = torch.cat([before, text[start - _LAST_TOKENS : start], after]) if start else first
            repetitions.append(Repetition(start, end, torch.cat([told, text[start:end]])))
        return repetitions


def prune(
    slots: "Slots", scores: "Tensor", count: int, rope: "Rope", *, together: int = 1, block: int = POOL_BLOCK
) -> "tuple[Slots, float, Counts | None]":
    """Of `slots` those with the best `scores` [layers, kv_heads, slots], so many that they fill `count` slots; the
    share of all scores that the others have; and the counts of the pool that the first slots are, where there is one.

    `together` heads of a layer at a time share their slots: by the `block`, those whose scores add up to more; what is
    left of `count` behind whole blocks each head has alike. Of equal scores the first is kept. Keys are turned so that
    behind a slot's own position they stand where they did, the last of the text at the last slot's.
    """
    import torch

    from memory_worker.models.beacon import Slots

    kept, counts = choose_pairs(scores, count, together, block)
    cells = torch.from_numpy(pack(kept.cpu().numpy(), counts, block)).to(scores.device)  # head * slots + place
    total = scores.sum(dtype=torch.float64)
    dropped = 1.0 - float(scores[kept].sum(dtype=torch.float64) / total) if count < len(slots) else 0.0
    shifts = cells % len(slots) - len(slots) + count - torch.arange(count, device=cells.device)
    keys, values = (
        part.flatten(1, 2)
        .gather(1, cells.flatten(1)[..., None].expand(-1, -1, part.shape[3]))
        .view_as(part[:, :, :count])
        for part in (slots.keys, slots.values)
    )
    return Slots(rope.shift_layers(keys, shifts), values), dropped, counts if counts.any() else None


def choose_pairs(scores: "Tensor", count: int, together: int, block: int) -> "tuple[Tensor, Counts]":
    """Which pairs are kept, bool [layers, kv_heads, slots], and the counts of their pool: see `prune`."""
    import torch

    layers, heads, places = scores.shape
    alike = count % block if together > 1 else count
    best = scores.sort(dim=-1, descending=True, stable=True)
    blocks = (places - alike) // block  # that a head may have
    pooled = best.values[..., alike : alike + blocks * block].unflatten(2, (blocks, block)).sum(dim=-1)
    ranked = pooled.view(layers, heads // together, -1).sort(dim=-1, descending=True, stable=True).indices
    chosen = torch.zeros_like(ranked).scatter_(2, ranked[..., : (count - alike) // block * together], 1)
    counts = chosen.view(layers, heads, blocks).sum(dim=-1) * block
    ranks = torch.empty_like(best.indices).scatter_(
        2, best.indices, torch.arange(places, device=scores.device).expand_as(best.indices)
    )
    shares = counts.view(layers, -1, together).cpu().numpy().astype("int32")
    return ranks < counts[..., None] + alike, shares
