"""The beacon memory model: tokens into compressed KV slots, on stock decoders with beacon weights."""

from memory_worker.models.beacon.checkpoint import UnsupportedCheckpoint
from memory_worker.models.beacon.exchange import Exchange, ExchangeFailed
from memory_worker.models.beacon.model import BeaconModel, UnsupportedRatio
from memory_worker.models.beacon.rope import Rope, UnsupportedRope
from memory_worker.models.beacon.slots import Part, Slots
from memory_worker.models.beacon.windows import Repetition

__all__ = [
    "BeaconModel",
    "Exchange",
    "ExchangeFailed",
    "Part",
    "Repetition",
    "Rope",
    "Slots",
    "UnsupportedCheckpoint",
    "UnsupportedRatio",
    "UnsupportedRope",
]
