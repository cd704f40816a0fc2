"""The beacon memory model: tokens into compressed KV slots, on stock decoders with beacon weights."""

from memory_worker.beacon.checkpoint import UnsupportedCheckpoint
from memory_worker.beacon.exchange import Exchange, ExchangeFailed
from memory_worker.beacon.model import BeaconModel, UnsupportedRatio
from memory_worker.beacon.rope import Rope, UnsupportedRope
from memory_worker.beacon.slots import Part, Slots

__all__ = [
    "BeaconModel",
    "Exchange",
    "ExchangeFailed",
    "Part",
    "Rope",
    "Slots",
    "UnsupportedCheckpoint",
    "UnsupportedRatio",
    "UnsupportedRope",
]
