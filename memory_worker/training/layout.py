"""Where everything stands in one pass of training: the rows of a batch, their positions, and who sees whom.

All texts of a batch share one layout, so nothing is padded and nothing is masked that a shape can leave out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class TrainingWindow:
    """Tokens `start … end` of a text that are fed together."""

    start: int
    end: int
    ratio: int  # tokens per beacon; 0: no beacons, every token becomes a slot
    slot: int  # slots before it
    beacon: int  # beacons before it

    @property
    def beacons(self) -> int:
        return -(-(self.end - self.start) // self.ratio) if self.ratio else 0

    @property
    def kept(self) -> int:
        """Slots it becomes."""
        return self.beacons if self.ratio else self.end - self.start


@dataclass(frozen=True)
class Layout:
    """A text of `tokens` tokens cut into windows, and `tails` texts of `tail_tokens` that each follow it alone.

    Rows are in this order: the text's tokens, the tails' tokens, the beacons.
    """

    windows: tuple[TrainingWindow, ...]
    tails: int = 0
    tail_tokens: int = 0

    @classmethod
    def cut(
        cls, head: int, tokens: int, window: int, ratios: Sequence[int], tails: int = 0, tail_tokens: int = 0
    ) -> "Layout":
        """`head` raw tokens, then windows of `window` tokens up to `tokens` in all, the i-th at `ratios[i]`.

        `ratios` are used in turn where they are fewer than windows.
        """
        windows: list[TrainingWindow] = []
        slot = beacon = 0
        bounds = [*range(head, tokens, window), tokens]
        pieces = [(0, head, 0)] if head else []
        pieces += [(a, b, ratios[i % len(ratios)]) for i, (a, b) in enumerate(pairwise(bounds))]
        for start, end, ratio in pieces:
            windows.append(TrainingWindow(start, end, ratio, slot, beacon))
            slot += windows[-1].kept
            beacon += windows[-1].beacons
        return cls(tuple(windows), tails, tail_tokens)

    @property
    def tokens(self) -> int:
        return self.windows[-1].end if self.windows else 0

    @property
    def slots(self) -> int:
        return self.windows[-1].slot + self.windows[-1].kept if self.windows else 0

    @property
    def beacons(self) -> int:
        return self.windows[-1].beacon + self.windows[-1].beacons if self.windows else 0

    @property
    def stock_rows(self) -> int:
        """Rows that are tokens."""
        return self.tokens + self.tails * self.tail_tokens

    @property
    def rows(self) -> int:
        return self.stock_rows + self.beacons

    @cached_property
    def positions(self) -> Tensor:
        """[rows] int64: where each row stands in the key sequence that it is fed in."""
        at = torch.empty(self.rows, dtype=torch.int64)
        for window in self.windows:
            tokens = torch.arange(window.end - window.start)
            passed = tokens // window.ratio if window.ratio else 0
            at[window.start : window.end] = window.slot + tokens + passed
            ends = ((torch.arange(window.beacons) + 1) * max(window.ratio, 1)).clamp(max=window.end - window.start)
            first = self.stock_rows + window.beacon
            at[first : first + window.beacons] = window.slot + ends + torch.arange(window.beacons)
        at[self.tokens : self.stock_rows] = self.slots + torch.arange(self.tail_tokens).repeat(self.tails)
        return at

    @cached_property
    def kept(self) -> Tensor:
        """[slots] int64: the row that becomes each slot."""
        rows = [torch.empty(0, dtype=torch.int64)]
        for window in self.windows:
            first = self.stock_rows + window.beacon
            rows.append(
                torch.arange(first, first + window.beacons) if window.ratio else torch.arange(window.start, window.end)
            )
        return torch.cat(rows)

    def mask(self, window: TrainingWindow) -> Tensor:
        """[rows, slots + rows] bool: what its tokens, then its beacons, see of earlier slots and themselves."""
        return self._cached_masks[window]

    @cached_property
    def _cached_masks(self) -> dict[TrainingWindow, Tensor]:
        masks: dict[TrainingWindow, Tensor] = {}
        for window in self.windows:
            first = self.stock_rows + window.beacon
            own = torch.cat([self.positions[window.start : window.end], self.positions[first : first + window.beacons]])
            seen = torch.ones(len(own), window.slot, dtype=torch.bool)
            masks[window] = torch.cat([seen, own[:, None] >= own[None, :]], dim=1)
        return masks
