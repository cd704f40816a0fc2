"""Windows of texts, and where those of one pass lie among its rows: the bookkeeping of `BeaconModel`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_NONE = torch.empty(0, dtype=torch.int64)  # joined with others it adds nothing; alone it is a pass without rows


def token_ids(tokens: Sequence[int] | Tensor, vocabulary: int) -> Tensor:
    """One text's tokens as int64 [tokens] on the CPU. Raises `ValueError` if there are none, or none of the model's."""
    ids = torch.as_tensor(tokens, dtype=torch.int64, device="cpu")
    if ids.ndim != 1 or not len(ids):
        raise ValueError("tokens must be one sequence of ids, not empty")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ValueError(f"token ids must lie in 0 … {vocabulary - 1}")
    return ids


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens `start … end` of a text that are fed together: with beacons, or raw as head and question are."""

    start: int
    end: int
    ratio: int  # tokens per beacon; 0 for raw
    slot: int  # slots before it

    @property
    def tokens(self) -> int:
        return self.end - self.start

    @property
    def kept(self) -> int:
        """Slots it becomes."""
        return -(-self.tokens // self.ratio) if self.ratio else self.tokens

    @property
    def rows(self) -> int:
        return self.tokens + (self.kept if self.ratio else 0)

    def beacon_rows(self) -> Tensor:
        """Where in the window beacons stand: after every `ratio` tokens, the last one after the remainder."""
        beacons = torch.arange(self.kept if self.ratio else 0)
        return ((beacons + 1) * self.ratio).clamp(max=self.tokens) + beacons

    def kept_rows(self) -> Tensor:
        """Where in the window those rows stand whose keys and values become slots."""
        return self.beacon_rows() if self.ratio else torch.arange(self.tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Repetition:
    """What is read behind a text to see which of the text's slots its tokens `start … end` are repeated from."""

    start: int
    end: int
    tokens: Tensor  # [tokens] int32 or int64: an instruction, then the stretch itself


@dataclass(slots=True)
class Text:
    """A text on its way through the model, with the slots it has so far."""

    number: int  # among the documents of the call
    tokens: Tensor  # [tokens] int64 on the CPU
    windows: list[Window]
    keys: Tensor  # [layers, kv_heads, capacity, head_dim], rotated to their slots
    values: Tensor  # [layers, kv_heads, capacity, head_dim]

    def extend(self, token: int) -> Window:
        """A raw window of one more token, for which the buffers have room."""
        last, end = self.windows[-1], len(self.tokens)
        self.tokens = torch.cat([self.tokens, torch.tensor([token])])
        self.windows.append(Window(end, end + 1, 0, last.slot + last.kept))
        return self.windows[-1]


Group = list[tuple[Text, Window]]


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of some windows, one window after another. All tensors are int64, on the CPU."""

    spans: tuple[tuple[int, int], ...]  # first row and number of rows, by window
    beacons: Tensor  # rows of beacons
    kept: Tensor  # rows that become slots
    ids: Tensor  # tokens of all rows but beacons
    positions: Tensor  # [rows] places in their texts, counted from the first slot

    @classmethod
    def of(cls, members: Group) -> "Rows":
        """Of `members`, which may be none."""
        windows = [window for _, window in members]
        starts = [sum(window.rows for window in windows[:index]) for index in range(len(windows))]
        return cls(
            tuple((start, window.rows) for start, window in zip(starts, windows, strict=True)),
            _join([start + window.beacon_rows() for start, window in zip(starts, windows, strict=True)]),
            _join([start + window.kept_rows() for start, window in zip(starts, windows, strict=True)]),
            _join([text.tokens[window.start : window.end] for text, window in members]),
            _join([torch.arange(window.slot, window.slot + window.rows) for window in windows]),
        )

    @property
    def count(self) -> int:
        return len(self.positions)


def slots_of(members: Group) -> Tensor:
    """The slots that `members` become, in their texts: int64, on the CPU."""
    return _join([torch.arange(window.slot, window.slot + window.kept) for _, window in members])


def _join(pieces: Sequence[Tensor]) -> Tensor:
    return torch.cat([_NONE, *pieces])
