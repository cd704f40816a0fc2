"""What all kinds of memory have in common: an `Encoder` makes slots of tokens, group of windows by group.

The Memorizer has one of each kind that its model can make, and knows nothing else of kinds.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from cluster.planning.costs import MemoryKind
from memory_worker.memorize.kinds.gist import GistEncoder
from memory_worker.memorize.kinds.pruned import PrunedEncoder
from memory_worker.memorize.kinds.reading import ReadingEncoder
from memory_worker.messages import Language

if TYPE_CHECKING:
    from torch import Tensor

    from memory_worker.memorize.ranks import Ranks
    from memory_worker.models.beacon import Part, Slots
    from memory_worker.models.stock import MemoryModel


class Encoder(Protocol):
    """One kind of memory on one model."""

    @property
    def window(self) -> int:
        """Tokens that become slots together: a segment is cut, and a job goes on, between two windows."""

    @property
    def ratios(self) -> tuple[int, ...]:
        """Tokens for each slot that a memory may have. All divide the window, of which come `window // ratio` slots
        at most."""

    @property
    def ranks(self) -> int:
        """Processes that share a group."""

    @property
    def together(self) -> int:
        """KV heads of a layer that share their slots, each with a number of its own; 1 where all have equally many."""

    @property
    def checkpoint_windows(self) -> int | None:
        """Windows after which slots are made durable; none leaves that to the configuration."""

    def encode(
        self,
        documents: "Sequence[Tensor]",
        *,
        ratio: int,
        language: Language,
        memory: "Sequence[Slots]",
        group_windows: int,
    ) -> "Iterator[tuple[Part, ...]]":
        """The slots of `documents` (int32 [tokens] each), `group_windows` windows of all of them at a time.

        Each follows the slots of its own entry in `memory` alone: those of the head, and of what was encoded of the
        document before. Parts come in order, cut between windows. The same arguments give the same bytes, and a
        document goes on after any group as if nothing had been. `language` is that of what the model is told.
        """


def encoders(
    model: "MemoryModel", ranks: "Ranks | None", tokenizer: Any, *, room: int, together: int = 1
) -> dict[MemoryKind, Encoder]:
    """Of every kind that `model` can make; `ranks`, where there are any, share what can be shared.

    `room`: slots that a prompt of the engine may hold; `together`: KV heads of a layer that it lets share their slots.
    """
    from memory_worker.models.beacon.checkpoint import max_positions

    made: dict[MemoryKind, Encoder] = {
        "full": ReadingEncoder(model, ranks, beacons=False),
        "gist": GistEncoder(model, tokenizer),
    }
    if model.can_score:
        positions = max_positions(model.folder)
        made["pruned"] = PrunedEncoder(model, tokenizer, room=room, positions=positions, together=together)
    if model.has_beacons:
        made["beacon"] = ReadingEncoder(model, ranks, beacons=True)
    return made
