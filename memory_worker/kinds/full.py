"""`full`: the keys and values that any decoder has after reading the text, one slot for every token, loaded instead of
computed again. Windows are what goes through the model together; each sees all that is before it."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from memory_worker.messages import Language

if TYPE_CHECKING:
    from torch import Tensor

    from memory_worker.beacon import BeaconModel, Part, Slots
    from memory_worker.ranks import Ranks


class FullEncoder:
    """See `memory_worker.kinds.encoder.Encoder`."""

    ratios = (1,)

    def __init__(self, model: "BeaconModel", ranks: "Ranks | None") -> None:
        self._passes = ranks or model
        self.window = model.window
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
        return self._passes.compress_documents(documents, ratio=None, memory=memory, group_windows=group_windows)
