"""What work costs, in FLOPs, bytes and seconds: arithmetic on model shapes and rates, nothing else.

`docs/scaling.md` and `memorag plan` count with it; benchmarks hold it against what is measured.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cluster.errors import MessageError

MemoryKind = Literal["beacon", "full", "gist", "pruned"]
GIST_WINDOW = 4096  # tokens that are condensed to one gist
PRUNED_RATIOS = (2, 3, 4, 8, 16)
REPEATED_TOKENS = 512  # of a pruned memory's text, that are repeated at a time


class PlanError(MessageError, ValueError):
    """What is to be planned cannot be; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder, as its config.json has it."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    tied: bool  # input and output embedding are one
    window: int  # tokens compressed together, for a memory model
    dtype_bytes: int = 2

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "ModelShape":
        """From the content of a config.json. Raises `PlanError` naming what it lacks."""
        wanted = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
        if missing := [name for name in wanted if not config.get(name)]:
            raise PlanError(f"the model's config lacks {', '.join(missing)}: it is not a decoder that can be planned")
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            mlp=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
            window=config.get("beacon_window") or 2048,
        )

    @property
    def matrix_parameters(self) -> int:
        """Of all layers' matrices: each row that passes costs two FLOPs for each."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.mlp)

    @property
    def weight_bytes(self) -> int:
        """Of stock weights: layers and embeddings."""
        return (self.matrix_parameters + self.vocabulary * self.hidden * (1 if self.tied else 2)) * self.dtype_bytes

    @property
    def slot_bytes(self) -> int:
        """Keys and values of one position, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype_bytes


@dataclass(frozen=True, slots=True)
class RankRates:
    """What one rank, and the links between ranks, are taken to do."""

    flops: float  # FLOP/s, reached and not the device's peak
    link: float  # bytes/s that one rank receives in an all-gather
    latency_s: float  # of one all-gather, beside its bytes


@dataclass(frozen=True, slots=True)
class Memorizing:
    """What memorizing a text is predicted to take."""

    flops: float  # of all ranks together
    passes: int
    compute_s: float
    exchange_s: float
    received_bytes: int  # by each rank
    slots: int

    @property
    def seconds(self) -> float:
        return self.compute_s + self.exchange_s


def slots_of(tokens: int, ratio: int) -> int:
    """Slots of a text of whole windows but for its last."""
    return -(-tokens // ratio)


def window_of(shape: ModelShape, kind: MemoryKind) -> int:
    """Tokens that become slots together."""
    windows = {"gist": GIST_WINDOW, "pruned": pruned_window(shape.window)}
    return windows.get(kind, shape.window)


def pruned_window(window: int) -> int:
    """Tokens that are pruned together by a model with that `window`: three of them, some 1,500 at least; all ratios
    divide it."""
    step = math.lcm(*PRUNED_RATIOS)
    return max(1536, 3 * window // step * step)


def segment_tokens_of(shape: ModelShape, kind: MemoryKind, ratio: int, slots: int) -> int:
    """Tokens of a segment that has room for so many `slots`: whole windows, one at least."""
    window = window_of(shape, kind)
    return max(1, slots * ratio // window) * window


def ranks_of(kind: MemoryKind, ranks: int) -> int:
    """How many of a Memorizer's ranks share the work: gists and pruned memories are made by one."""
    return 1 if kind in ("gist", "pruned") else ranks


def window_flops(shape: ModelShape, tokens: int, ratio: int, slots: int, kind: MemoryKind = "beacon") -> float:
    """Of a window of `tokens` with `slots` before it; `ratio` is 1 for `full`. A gist is taken to be as long as it may.

    The window of a gist is read alone, with the gist being written behind it; then the gist is read after the slots.
    What is pruned is read, and then repeated behind what was read, where attention to the stretch is computed twice.
    """
    kept = slots_of(tokens, ratio)
    if kind == "full":
        return _row_flops(shape, tokens, slots)
    if kind == "gist":
        return _row_flops(shape, tokens + kept, 0) + _row_flops(shape, kept, slots)
    if kind == "pruned":
        scored = 3.0 * tokens * min(tokens, REPEATED_TOKENS) * shape.layers * shape.heads * shape.head_dim
        stretches = (min(REPEATED_TOKENS, tokens - start) for start in range(0, tokens, REPEATED_TOKENS))
        repeated = sum(_row_flops(shape, rows, slots + tokens) for rows in stretches)
        return _row_flops(shape, tokens, slots) + repeated + scored
    return _row_flops(shape, tokens + kept, slots)


def _row_flops(shape: ModelShape, rows: int, slots: int) -> float:
    """Matrices for every row, attention for what each row sees: `slots`, and the rows up to it."""
    seen = rows * slots + rows * (rows + 1) // 2
    return 2.0 * rows * shape.matrix_parameters + 4.0 * shape.layers * shape.heads * shape.head_dim * seen


def estimate_memorizing(
    shape: ModelShape,
    tokens: int,
    *,
    ratio: int,
    segment_tokens: int,
    ranks: int,
    group_windows: int,
    rates: RankRates,
    head_slots: int = 0,
    kind: MemoryKind = "beacon",
) -> Memorizing:
    """One text, in segments that each follow the head alone, `group_windows` of a rank to a pass.

    Ranks of a pass have equal shares but for what does not divide; the exchange is not hidden behind any work. Gists
    and pruned memories are made by one rank: `ranks` must be 1 then, and of gists the rate what is reached while they
    are written.
    """
    flops = compute_s = exchange_s = 0.0
    received = passes = 0
    slot_bytes = shape.slot_bytes // shape.layers
    window = window_of(shape, kind)
    for group in _passes(window, tokens, ratio, segment_tokens, ranks * group_windows, head_slots):
        work = sum(window_flops(shape, count, ratio, slots, kind) for count, slots in group)
        share = math.ceil(len(group) / ranks)
        flops += work
        compute_s += work * share / len(group) / rates.flops
        passes += 1
        if ranks > 1:
            most = share * max(slots_of(count, ratio) for count, _ in group)
            sent = (ranks - 1) * most * slot_bytes
            received += shape.layers * sent
            exchange_s += shape.layers * (rates.latency_s + sent / rates.link)
    return Memorizing(flops, passes, compute_s, exchange_s, received, slots_of(tokens, ratio))


def _passes(
    window: int, tokens: int, ratio: int, segment_tokens: int, group: int, head_slots: int
) -> Iterator[list[tuple[int, int]]]:
    """Tokens of each window and the slots before it, as many windows as go together."""
    windows: list[tuple[int, int]] = []
    for start in range(0, tokens, window):
        within = start % segment_tokens
        windows.append((min(window, tokens - start), head_slots + within // ratio))
        if len(windows) == group:
            yield windows
            windows = []
    if windows:
        yield windows
