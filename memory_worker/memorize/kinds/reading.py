"""`beacon` and `full`: what the model keeps of a text that it reads.

`full` keeps the keys and values of every token, as any decoder has them, loaded instead of computed again. `beacon`
keeps those of trained beacons, one after every `ratio` tokens (arXiv 2409.05591, section 2.2). Windows are what goes
through the model together.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from memory_worker.messages import Language

if TYPE_CHECKING:
    from torch import Tensor

    from memory_worker.memorize.ranks import Ranks
    from memory_worker.models.beacon import Part, Slots
    from memory_worker.models.stock import MemoryModel


class ReadingEncoder:
    """See `kinds.encoder.Encoder`."""

    checkpoint_windows = None
    together = 1

    def __init__(self, model: "MemoryModel", ranks: "Ranks | None", *, beacons: bool) -> None:
        """`beacons`: whether to compress, for which `model` must have beacon weights."""
        self._passes = ranks or model
        self._beacons = beacons
        self.window = model.window
        self.ratios = model.ratios_that_divide() if beacons else (1,)
        self.ranks = ranks.count if ranks else 1

    def encode(
        self,
        documents: "Sequence[Tensor]",
        *,
        ratio: int,
        language: Language,
        memory: "Sequence[Slots]",
        group_windows: int,
    ) -> "Iterator[tuple[Part, ...]]":
        return self._passes.compress_documents(
            documents, ratio=ratio if self._beacons else None, memory=memory, group_windows=group_windows
        )
