"""The memory model: makes slots of tokens, compressed into beacons or one for each, and reads on from them.

A group of windows goes through each layer together. At a layer, window *w* needs of the windows before it only
their beacons' keys and values at that layer, and those are there as soon as the group has been projected: so the
recurrence runs over layers and not over the text, and the result is that of one window after another. Beacon keys
are turned twice: to their slot, for later windows, and to their place in the window, for their own.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from cluster.errors import MessageError
from memory_worker.models.beacon import checkpoint
from memory_worker.models.beacon.attention import attend, most_attention
from memory_worker.models.beacon.checkpoint import Layer, Shape, UnsupportedCheckpoint, Weights
from memory_worker.models.beacon.exchange import Exchange
from memory_worker.models.beacon.layers import add_linear, add_mlp, rms_norm
from memory_worker.models.beacon.rope import Rope, rotate_by
from memory_worker.models.beacon.slots import Part, Slots
from memory_worker.models.beacon.windows import Group, Repetition, Rows, Text, Window, slots_of, token_ids

RATIOS = (2, 4, 8, 16, 32)
SINKS = 4  # first slots that attention to a repeated stretch is shared with, as in KVzip
# Measured on two CPU cores with benchmarks/memorize.py; on a GPU enough rows to fill it at window 2048.
_GROUP_WINDOWS = {"cpu": 4, "cuda": 8}


class UnsupportedRatio(MessageError, ValueError):
    """The ratio does not divide the model's window."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """One group of windows on its way through the layers, on this rank."""

    group: Group
    mine: Group  # what of the group this rank runs: all of it, if it is the only one
    rows: Rows  # of `mine`
    beacons: Tensor  # rows.beacons and rows.kept, on the device
    kept: Tensor
    in_place: tuple[Tensor, Tensor]  # the RoPE table of the rows
    at_slot: tuple[Tensor, Tensor]  # and of the slots that the whole group becomes
    exchange: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None  # own kept keys, values: the whole group's
    watch: Callable[[int, Tensor, Tensor], None] | None  # gets each layer's index, and rotated queries and keys


@dataclass(frozen=True)
class BeaconModel:
    """A decoder, with beacon weights or without. Made by `from_pretrained`; calls on it change nothing in it."""

    folder: Path
    shape: Shape
    weights: Weights = field(repr=False)
    rope: Rope = field(repr=False)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "BeaconModel":
        """Loads a Qwen2, Qwen3, Mistral or Llama checkpoint from a folder or the hub.

        Raises `UnsupportedCheckpoint` or `UnsupportedRope`.
        """
        folder = checkpoint.resolve(path)
        shape = Shape.of(folder)
        where = torch.device(device)
        kind: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        rope = checkpoint.rope_of(folder).to(where)
        return cls(folder, shape, checkpoint.load(folder, shape, kind, where), rope)

    @property
    def has_beacons(self) -> bool:
        """Whether it can compress; without, every token that it reads becomes a slot."""
        return self.weights.beacon is not None

    can_score = True  # see `StockModel.can_score`

    @property
    def layers(self) -> int:
        return self.shape.layers

    @property
    def kv_heads(self) -> int:
        return self.shape.kv_heads

    @property
    def head_dim(self) -> int:
        return self.shape.head_dim

    @property
    def window(self) -> int:
        """Tokens compressed together."""
        return self.shape.window

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and slots."""
        return self.weights.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.embedding.device

    @property
    def group_windows(self) -> int:
        """Windows that go through each layer together where a call does not say."""
        return _GROUP_WINDOWS.get(self.device.type, 1)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, hexadecimal, of the checkpoint's recipe and weights: memories of another one do not fit."""
        return checkpoint.fingerprint(self.folder)

    def ratios_that_divide(self) -> tuple[int, ...]:
        """The ratios this model can compress at, ascending."""
        return tuple(r for r in sorted({*RATIOS, *self.shape.ratios}) if self.window % r == 0)

    def check_ratio(self, ratio: int) -> None:
        """Raises `UnsupportedRatio` if `ratio` does not divide the window."""
        if ratio < 1 or self.window % ratio:
            fitting = ", ".join(map(str, self.ratios_that_divide()))
            raise UnsupportedRatio(f"ratio {ratio} does not divide the window of {self.window} tokens; use {fitting}")

    def compress(
        self,
        tokens: Sequence[int] | Tensor,
        *,
        ratio: int,
        head: int = 0,
        memory: Slots | None = None,
        group_windows: int | None = None,
        on_group: Callable[[int, Slots], None] | None = None,
    ) -> Slots:
        """The slots of `tokens`, continuing from `memory`, whose own slots are not returned again.

        The first `head` tokens are kept raw, a slot each; the others become one slot for every `ratio` tokens and
        one for the remainder. `on_group` gets the tokens done so far and the new slots after each group.
        Raises `UnsupportedRatio`, `ValueError` for token ids outside the vocabulary, or `UnsupportedCheckpoint` where
        tokens are to be compressed without beacon weights.
        """
        text = self._begin(tokens, memory, ratio=ratio, head=head)
        keys = torch.empty_like(text.keys[:, :, len(memory) if memory else 0 :])
        done = filled = 0
        for parts in self._encode(iter([text]), group_windows):
            for part in parts:
                keys[:, :, filled : filled + len(part.slots)] = part.slots.keys
                filled += len(part.slots)
                done += part.tokens
                if on_group:
                    on_group(done, part.slots)
        return Slots(keys, text.values[:, :, len(memory) if memory else 0 :].contiguous())

    def compress_documents(
        self,
        documents: Sequence[Sequence[int] | Tensor],
        *,
        ratio: int | None,
        memory: Slots | Sequence[Slots | None] | None = None,
        group_windows: int | None = None,
        exchange: Exchange | None = None,
    ) -> Iterator[tuple[Part, ...]]:
        """Compresses several documents, windows of different ones sharing a pass; yields what each pass added.

        Without a `ratio` nothing is compressed: every token becomes a slot, by stock weights alone.

        Each document sees `memory` (the head's slots, or one entry per document) and itself alone. Parts of a
        document come in order; a document is resumed by giving the slots it has as its memory and the tokens from
        the next window on. Only documents in the present pass are held, so what is yielded can be stored and let go.
        With `exchange`, the windows of each pass are spread over its ranks, all of which must make the same calls in
        the same order; each yields all parts.
        Raises as `compress`, `ValueError` for an empty document, and `ExchangeFailed`.
        """
        memories = [memory] * len(documents) if memory is None or isinstance(memory, Slots) else memory
        texts = (
            self._begin(tokens, before, ratio=ratio or 1, head=0 if ratio else len(tokens), number=number)
            for number, (tokens, before) in enumerate(zip(documents, memories, strict=True))
        )
        if ratio is not None:
            self.check_ratio(ratio)
        return self._encode(texts, group_windows, exchange)

    def read_scored(
        self, tokens: Sequence[int] | Tensor, *, memory: Slots, repetitions: Sequence[Repetition]
    ) -> tuple[Slots, Tensor]:
        """The slots of `tokens`, all kept, that follow `memory`; and how much attention repeating them pays to each.

        Scores are float32 [layers, kv_heads, tokens]: those of a stretch are the most attention that any token of its
        repetition pays, shared with the memory's first slots and with the repetition itself (KVzip, arXiv 2505.23416,
        section 3). 0 outside of what is repeated. Nothing is compressed, so any model can. Raises as `compress`.
        """
        text = self._begin(tokens, memory, head=len(tokens), room=max(len(r.tokens) for r in repetitions))
        slots = Slots.concat([part.slots for (part,) in self._encode(iter([text]), None)])
        scores = torch.zeros(self.layers, self.kv_heads, len(tokens), device=self.device)
        for repetition in repetitions:
            ids = token_ids(repetition.tokens, len(self.weights.embedding))
            window = Window(0, len(ids), 0, len(memory) + len(tokens))
            stretch = slice(len(memory) + repetition.start, len(memory) + repetition.end)

            def watch(
                layer: int, queries: Tensor, own: Tensor, stretch: slice = stretch, repeated: Repetition = repetition
            ) -> None:
                keys = text.keys[layer]
                most = most_attention(queries, keys[:, : min(SINKS, len(memory))], keys[:, stretch], own)
                scores[layer, :, repeated.start : repeated.end] = most

            again = Text(0, ids, [window], text.keys, text.values)  # in the room behind, each in the place of the last
            self._run([(again, window)], watch=watch)
        return slots, scores

    def logits(self, tokens: Sequence[int] | Tensor, memory: Slots | None = None) -> Tensor:
        """Logits [tokens, vocab] float32 of `tokens` that follow `memory`, with stock weights alone."""
        text = self._begin(tokens, memory, head=len(tokens))
        return torch.cat(
            [self._read(hidden) for group in self._pack(iter([text]), None) for hidden in self._run(group)]
        )

    def generate(
        self, tokens: Sequence[int] | Tensor, memory: Slots | None = None, *, max_new_tokens: int
    ) -> list[int]:
        """The `max_new_tokens` likeliest tokens after `memory` and `tokens`, one by one; it stops at nothing."""
        return self.generate_each([tokens], memory, max_new_tokens=max_new_tokens)[0]

    def generate_each(
        self,
        prompts: Sequence[Sequence[int] | Tensor],
        memory: Slots | None = None,
        *,
        max_new_tokens: int,
        stop: Collection[int] = (),
    ) -> list[list[int]]:
        """The likeliest tokens after each prompt that follows `memory`, one by one, in all prompts at a time.

        A prompt ends at the first of `stop`, which is left out, or after `max_new_tokens`.
        """
        texts = [
            self._begin(tokens, memory, head=len(tokens), room=max_new_tokens, number=number)
            for number, tokens in enumerate(prompts)
        ]
        last: dict[int, Tensor] = {}  # hidden state [1, hidden] of each text's last token
        for group in self._pack(iter(texts), None):
            last |= {text.number: rows[-1:] for (text, _), rows in zip(group, self._run(group), strict=True)}
        produced: list[list[int]] = [[] for _ in texts]
        while last:
            chosen = self._read(torch.cat([*last.values()])).argmax(dim=-1).tolist()
            group = []
            for number, token in zip(last, chosen, strict=True):
                if token in stop:
                    continue
                produced[number].append(token)
                if len(produced[number]) < max_new_tokens:
                    group.append((texts[number], texts[number].extend(token)))
            last = {text.number: rows for (text, _), rows in zip(group, self._run(group), strict=True)} if group else {}
        return produced

    def _begin(
        self,
        tokens: Sequence[int] | Tensor,
        memory: Slots | None,
        *,
        ratio: int = 1,
        head: int = 0,
        room: int = 0,
        number: int = 0,
    ) -> Text:
        """A text cut into windows, with its buffers: `memory` in its first slots, and `room` for more slots."""
        self.check_ratio(ratio)
        ids = token_ids(tokens, len(self.weights.embedding))
        if not 0 <= head <= len(ids):
            raise ValueError(f"head ({head}) must be a part of the {len(ids)} tokens")
        if memory is not None:
            memory.expect(self.layers, self.kv_heads, self.head_dim)
        if head < len(ids) and not self.has_beacons:
            raise UnsupportedCheckpoint(f"{self.folder} has no beacon weights: it cannot compress what it reads")
        slot = len(memory) if memory else 0
        windows = []
        starts = [*range(0, head, self.window), *range(head, len(ids), self.window)]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            windows.append(Window(start, end, ratio if start >= head else 0, slot))
            slot += windows[-1].kept
        size = (self.layers, self.kv_heads, slot + room, self.head_dim)
        keys, values = (torch.empty(size, dtype=self.dtype, device=self.device) for _ in range(2))
        if memory:
            places = torch.arange(len(memory), device=self.device)
            for layer in range(self.layers):
                raw = memory.keys[layer].to(self.device, self.dtype)
                keys[layer, :, : len(memory)] = self.rope.rotate(raw, places)
            values[:, :, : len(memory)] = memory.values
        return Text(number, ids, windows, keys, values)

    def _pack(self, texts: Iterator[Text], group_windows: int | None) -> Iterator[Group]:
        """Windows in order, as many together as the group's tokens allow; a text is begun when its turn comes."""
        room = self.window * (group_windows or self.group_windows)
        group: Group = []
        held = 0
        for text in texts:
            for window in text.windows:
                if group and held + window.tokens > room:
                    yield group
                    group, held = [], 0
                group.append((text, window))
                held += window.tokens
        if group:
            yield group

    def _encode(
        self, texts: Iterator[Text], group_windows: int | None, exchange: Exchange | None = None
    ) -> Iterator[tuple[Part, ...]]:
        """Runs all windows of `texts`; yields each group's new slots by text."""
        for group in self._pack(texts, group_windows):
            kept = sum(window.kept for _, window in group)
            size = (self.layers, self.kv_heads, kept, self.head_dim)
            fresh = torch.empty(size, dtype=self.dtype, device=self.device)
            self._run(group, fresh, exchange)
            parts, at = [], 0
            for _, members in groupby(group, key=lambda member: member[0].number):
                present = [*members]
                (text, first), last = present[0], present[-1][1]
                start, end = first.slot, last.slot + last.kept
                keys = fresh[:, :, at : at + end - start].contiguous()
                slots = Slots(keys, text.values[:, :, start:end].clone())
                parts.append(Part(text.number, last.end - first.start, slots, last is text.windows[-1]))
                at += end - start
            yield tuple(parts)

    @torch.inference_mode()
    def _run(
        self,
        group: Group,
        fresh: Tensor | None = None,
        exchange: Exchange | None = None,
        watch: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> list[Tensor]:
        """One pass of `group` through all layers; writes its kept keys and values into the texts' buffers.

        `fresh` [layers, kv_heads, kept, head_dim] takes the same keys unrotated. Returns the last hidden states of
        each window that this rank ran, [rows, hidden].
        """
        present = self._prepare(group, exchange, watch)
        rows = present.rows
        ordinary = torch.ones(rows.count, dtype=torch.bool)
        ordinary[rows.beacons] = False
        hidden = torch.empty(rows.count, self.shape.hidden, dtype=self.dtype, device=self.device)
        hidden[ordinary.to(self.device)] = self.weights.embedding[rows.ids.to(self.device)]
        if self.weights.beacon is not None:
            hidden[present.beacons] = self.weights.beacon
        for index, layer in enumerate(self.weights.layers):
            keys = self._attend(hidden, layer, index, present)
            if fresh is not None:
                fresh[index] = keys
            add_mlp(hidden, layer, self.shape.epsilon)
        return [hidden[start : start + count] for start, count in rows.spans]

    def _prepare(
        self, group: Group, exchange: Exchange | None, watch: Callable[[int, Tensor, Tensor], None] | None
    ) -> _Pass:
        mine, gather = group, None
        if exchange:
            work = [self._work(window) for _, window in group]
            spread = exchange.spread(work, [window.kept for _, window in group], self.device)
            mine, gather = [group[index] for index in spread.mine], partial(exchange.gather, spread)
        rows = Rows.of(mine)
        return _Pass(
            group,
            mine,
            rows,
            rows.beacons.to(self.device),
            rows.kept.to(self.device),
            self.rope.table(rows.positions.to(self.device)),
            self.rope.table(slots_of(group).to(self.device)),
            gather,
            watch,
        )

    def _work(self, window: Window) -> float:
        """Multiply-adds of a window in one layer."""
        shape, mlp = self.shape, self.weights.layers[0].down.shape[1]
        matrices = shape.hidden * (shape.head_dim * 2 * (shape.heads + shape.kv_heads) + 3 * mlp)
        return window.rows * (matrices + 2 * shape.heads * shape.head_dim * (window.slot + window.rows / 2))

    def _attend(self, hidden: Tensor, layer: Layer, index: int, present: _Pass) -> Tensor:
        """Adds the layer's attention to `hidden` [rows, hidden]; returns the group's unrotated kept keys."""
        shape, beacons = self.shape, present.beacons
        normed = rms_norm(hidden, layer.attention_norm, shape.epsilon)
        qkv = linear(normed, layer.qkv, layer.qkv_bias)
        if len(beacons) and layer.beacon_qkv is not None:
            qkv[beacons] = linear(normed[beacons], layer.beacon_qkv, layer.beacon_qkv_bias)
        heads = qkv.unflatten(1, (-1, shape.head_dim)).transpose(0, 1)  # [heads + 2 kv_heads, rows, head_dim]
        split = shape.heads + shape.kv_heads
        if layer.head_norms:
            for part, norm in zip((heads[: shape.heads], heads[shape.heads : split]), layer.head_norms, strict=True):
                part.copy_(rms_norm(part, norm, shape.epsilon))
        turned, values = rotate_by(heads[:split], *present.in_place), heads[split:]
        raw_keys, kept_values = heads[shape.heads : split, present.kept], values[:, present.kept]
        if present.exchange:
            raw_keys, kept_values = present.exchange(raw_keys, kept_values)
        slot_keys = rotate_by(raw_keys, *present.at_slot)
        at = 0
        for text, window in present.group:
            place, source = slice(window.slot, window.slot + window.kept), slice(at, at + window.kept)
            text.keys[index, :, place] = slot_keys[:, source]
            text.values[index, :, place] = kept_values[:, source]
            at += window.kept
        if present.watch:
            present.watch(index, turned[: shape.heads], turned[shape.heads :])
        attended = torch.empty(len(hidden), shape.heads * shape.head_dim, dtype=self.dtype, device=self.device)
        for (start, count), (text, window) in zip(present.rows.spans, present.mine, strict=True):
            own = slice(start, start + count)
            attend(
                turned[: shape.heads, own],
                turned[shape.heads :, own],
                values[:, own],
                text.keys[index, :, : window.slot],
                text.values[index, :, : window.slot],
                attended[own],
            )
        add_linear(hidden, attended, layer.out, layer.out_bias)
        return raw_keys

    @torch.inference_mode()
    def _read(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocab] float32 of last hidden states [rows, hidden]."""
        normed = rms_norm(hidden, self.weights.norm, self.shape.epsilon)
        return linear(normed, self.weights.head).to(torch.float32)
