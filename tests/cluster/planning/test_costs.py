"""Counted costs: against what the benchmarks count by their own formulas, and the table of docs/scaling.md."""

import math
from pathlib import Path

import pytest

from benchmarks import memorize
from cluster.planning.costs import (
    GIST_WINDOW,
    PRUNED_RATIOS,
    REPEATED_TOKENS,
    ModelShape,
    RankRates,
    estimate_memorizing,
    window_flops,
    window_of,
)

QWEN2_7B = ModelShape(
    layers=28,
    hidden=3584,
    heads=28,
    kv_heads=4,
    head_dim=128,
    mlp=18944,
    vocabulary=152064,
    tied=False,
    window=2048,
)
WITHIN_NODE = RankRates(flops=0.6 * 790e12, link=300e9, latency_s=1e-4)
ACROSS_NODES = RankRates(flops=0.6 * 790e12, link=40e9, latency_s=1e-4)
DOCUMENT = Path(__file__).parents[3] / "docs" / "scaling.md"


def test_a_config_gives_the_shape() -> None:
    config = {
        "num_hidden_layers": 28,
        "hidden_size": 3584,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    }
    assert ModelShape.of(config) == QWEN2_7B
    assert QWEN2_7B.slot_bytes == 57_344 and round(QWEN2_7B.weight_bytes / 2e9, 1) == 7.6
    with pytest.raises(ValueError, match="lacks hidden_size, vocab_size"):
        ModelShape.of(config | {"hidden_size": None, "vocab_size": 0})


@pytest.mark.parametrize("tokens", [1, 5000, 123_456])
def test_flops_are_those_that_the_benchmark_counts(tokens: int) -> None:
    m = memorize
    shape = ModelShape(m.LAYERS, m.HIDDEN, m.HEADS, m.KV_HEADS, m.HEAD_DIM, m.MLP, m.VOCABULARY, True, m.WINDOW)
    rates = RankRates(flops=1e12, link=1e9, latency_s=0.0)
    whole = 10**6 * m.WINDOW
    counted = estimate_memorizing(
        shape, tokens, ratio=m.RATIO, segment_tokens=whole, ranks=1, group_windows=4, rates=rates
    )
    assert counted.flops == pytest.approx(sum(m.count_flops(tokens)))
    assert counted.seconds == pytest.approx(counted.flops / 1e12) and counted.received_bytes == 0
    assert counted.slots == math.ceil(tokens / m.RATIO)


def test_the_exchange_is_each_ranks_slots_to_each_other_rank() -> None:
    tokens, ranks = 64 * 2048, 4
    found = estimate_memorizing(
        QWEN2_7B, tokens, ratio=16, segment_tokens=tokens, ranks=ranks, group_windows=8, rates=WITHIN_NODE
    )
    assert found.passes == 2
    assert found.received_bytes == tokens // 16 * QWEN2_7B.slot_bytes * (ranks - 1) // ranks
    assert found.exchange_s == pytest.approx(2 * 28 * 1e-4 + found.received_bytes / 300e9)


@pytest.mark.parametrize("segment_tokens", [2_074_624, 10_000 * 2048], ids=["segments", "one sequence"])
def test_the_documents_table_is_what_is_computed(segment_tokens: int) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for tokens in (10**6, 10**7):
        alone = 0.0
        for ranks, rates in ((1, WITHIN_NODE), (8, WITHIN_NODE), (64, ACROSS_NODES)):
            x = estimate_memorizing(
                QWEN2_7B,
                tokens,
                ratio=16,
                segment_tokens=segment_tokens,
                ranks=ranks,
                group_windows=8,
                rates=rates,
            )
            alone = alone or x.seconds
            cells = [
                f"{tokens:,}",
                f"{ranks}",
                f"{x.flops / 1e15:,.0f}",
                f"{x.passes}",
                f"{x.received_bytes / 1e9:.1f}",
            ]
            cells += [f"{x.compute_s:,.2f}", f"{x.exchange_s:.2f}", f"{x.seconds:,.1f}", f"{alone / x.seconds:.1f}"]
            assert f"| {' | '.join(cells)} |" in text


def test_a_full_memory_costs_what_reading_its_text_does() -> None:
    read = window_flops(QWEN2_7B, 2048, 1, 500, "full")
    weights = 2 * 2048 * QWEN2_7B.matrix_parameters
    assert read - weights == 4 * 28 * 28 * 128 * (2048 * 500 + 2048 * 2049 / 2)
    found = estimate_memorizing(
        QWEN2_7B, 10_000, ratio=1, segment_tokens=8192, ranks=1, group_windows=8, rates=WITHIN_NODE, kind="full"
    )
    assert found.slots == 10_000
    starts = (0, 2048, 4096, 6144, 0)
    windows = [window_flops(QWEN2_7B, min(2048, 10_000 - 2048 * n), 1, s, "full") for n, s in enumerate(starts)]
    assert found.flops == pytest.approx(sum(windows))


def test_a_gist_is_written_behind_its_window_and_then_read() -> None:
    gist = GIST_WINDOW // 16
    found = estimate_memorizing(
        QWEN2_7B, 3 * GIST_WINDOW, ratio=16, segment_tokens=3 * GIST_WINDOW, ranks=1, group_windows=8,
        rates=WITHIN_NODE, kind="gist",
    )  # fmt: skip
    assert found.slots == 3 * gist and found.passes == 1
    written = 3 * window_flops(QWEN2_7B, GIST_WINDOW + gist, 1, 0, "full")
    read = sum(window_flops(QWEN2_7B, gist, 1, number * gist, "full") for number in range(3))
    assert found.flops == pytest.approx(written + read)


def test_what_is_pruned_is_read_and_then_repeated() -> None:
    window = window_of(QWEN2_7B, "pruned")
    assert window == 3 * 2048 and all(window % ratio == 0 for ratio in PRUNED_RATIOS)
    found = estimate_memorizing(
        QWEN2_7B, 2 * window, ratio=4, segment_tokens=2 * window, ranks=1, group_windows=1,
        rates=WITHIN_NODE, kind="pruned",
    )  # fmt: skip
    assert found.slots == 2 * window // 4 and found.passes == 2
    read = sum(window_flops(QWEN2_7B, window, 1, n * window // 4, "full") for n in range(2))
    stretches = window // REPEATED_TOKENS
    repeated = sum(
        stretches * window_flops(QWEN2_7B, REPEATED_TOKENS, 1, n * window // 4 + window, "full") for n in range(2)
    )
    assert read + repeated < found.flops < 1.05 * (read + repeated)
    assert found.flops < 2.5 * read
