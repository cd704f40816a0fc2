"""`beacon`: windows compressed by trained beacons, a slot for every `ratio` tokens (arXiv 2409.05591, section 2.2)."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from memory_worker.messages import Language

if TYPE_CHECKING:
    from torch import Tensor

    from memory_worker.beacon import BeaconModel, Part, Slots
    from memory_worker.ranks import Ranks


class BeaconEncoder:
    """See `memory_worker.kinds.encoder.Encoder`."""

    def __init__(self, model: "BeaconModel", ranks: "Ranks | None") -> None:
        """`model` has beacon weights."""
        self._passes = ranks or model
        self.window = model.window
        self.ratios = model.ratios_that_divide()
        self.ranks = ranks.count if ranks else 1
        self.checkpoint_windows = None

    def encode(
        self,
        documents: "Sequence[Tensor]",
        *,
        ratio: int,
        language: Language,
        memory: "Sequence[Slots]",
        group_windows: int,
    ) -> "Iterator[tuple[Part, ...]]":
        return self._passes.compress_documents(documents, ratio=ratio, memory=memory, group_windows=group_windows)
