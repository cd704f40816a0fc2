"""Plans: each need is what its rates say, the fullest binds, and the command line shows it."""

import json
import math
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.planning.costs import ModelShape
from cluster.planning.plan import Demand, Rates, Replica, Sizes, curve, plan, shared_questions_per_s
from serving.cli.main import app

SHAPE = ModelShape(
    layers=4, hidden=256, heads=4, kv_heads=2, head_dim=64, mlp=768, vocabulary=4096, tied=True, window=512
)
RATES = Rates(
    profile="embedded",
    machine="a machine",
    memorize_flops=1e12,
    recall_questions_per_s=10.0,
    recall_s=0.3,
    embed_passages_per_s=200.0,
    search_questions_per_s=40.0,
    search_texts=5.0,
    generate_tokens_per_s=1000.0,
    answer_tokens=50.0,
    characters_per_token=4.0,
    passage_characters=400.0,
    passage_bytes=1200.0,
    head_slots=64,
    recall_core_s=0.1,
    search_core_s=0.05,
    generate_core_s=0.001,
    route_core_s=0.03,
)
SIZES = Sizes(
    memory=SHAPE,
    memorizer=Replica(1, 1, 8),
    ranks=1,
    group_windows=4,
    segment_slots=10**9,
    recaller=Replica(1, 1, 8),
    kv_bytes=1e9,
    keeper_bytes=2e9,
    retrieval=Replica(0.5, 1, 16),
    generator=Replica(2, 1, 4),
    router=Replica(0, 0.5, 32),
)
DEMAND = Demand(memories=1000, tokens=512_000, questions_per_s=100.0, ratio=8, hours=1.0, hot=0.1)


def test_a_plan_counts_slots_and_work_of_the_kind() -> None:
    beacon, full, gist = (
        plan(replace(DEMAND, kind=kind, ratio=ratio), SIZES, RATES)
        for kind, ratio in (("beacon", 8), ("full", 1), ("gist", 8))
    )
    assert (beacon.slots, full.slots, gist.slots) == (64_064, 512_064, 64_064)
    assert full.memory_bytes == 512_064 * SHAPE.slot_bytes
    assert gist.memorize_s < full.memorize_s
    shared = plan(replace(DEMAND, kind="gist"), replace(SIZES, ranks=4), RATES)
    assert shared.memorize_s == gist.memorize_s, "gists are made by one rank"


def test_each_need_is_what_its_rate_says() -> None:
    found = plan(DEMAND, SIZES, RATES)
    memory, retrieval, generator, cpu = found.pools
    needs = {(need.pool, need.resource): need for pool in found.pools for need in pool.needs}
    memory_bytes = (64_000 + 64) * SHAPE.slot_bytes
    passages = 512_000 * 4 / 400

    assert (found.slots, found.memory_bytes) == (64_064, memory_bytes)
    assert found.storage_bytes == 1000 * (memory_bytes + 512_000 * 4 + passages * 1200)
    assert found.store_bytes == 100 * memory_bytes
    assert needs["memory", "recalling"].wanted == 10
    assert needs["memory", "KV cache"].wanted == pytest.approx(100 * memory_bytes / 1e9)
    assert needs["memory", "object store"].wanted == pytest.approx(100 * memory_bytes / 2e9)
    assert needs["memory", "memorizing"].wanted == pytest.approx(1000 * found.memorize_s / 3600)
    assert needs["retrieval", "embedding"].wanted == pytest.approx((1000 * passages / 3600 + 500) / 200)
    assert needs["retrieval", "searching"].wanted == pytest.approx(2.5)
    assert needs["generator", "generating"].wanted == pytest.approx(5.0)
    assert needs["cpu", "routing"].wanted == pytest.approx(6.0) and (cpu.gpus, cpu.nodes) == (0, 1)
    assert all(need.wanted <= need.given for need in needs.values())
    assert (generator.gpus, generator.nodes) == (10, 2)
    recallers = max(10, math.ceil(100 * memory_bytes / 1e9))
    assert memory.gpus == recallers + needs["memory", "memorizing"].given
    assert found.binds == max(needs.values(), key=lambda need: need.fill)
    assert found.gpus == memory.gpus + retrieval.gpus + generator.gpus


def test_what_binds_follows_the_demand() -> None:
    def binds(**changes: float) -> str:
        demand = replace(DEMAND, **{"memories": 10, "hot": 1.0, "questions_per_s": 0.01, "hours": 1e6} | changes)
        return plan(demand, SIZES, RATES).pools[0].binds.resource

    assert binds(questions_per_s=999.0) == "recalling"
    assert binds(memories=1000) in ("KV cache", "object store")
    assert binds(hours=plan(DEMAND, SIZES, RATES).memorize_s * 10 / 3600) == "memorizing"


def test_ranks_divide_the_time_of_one_memory_and_take_as_many_gpus() -> None:
    one, four = (plan(DEMAND, replace(SIZES, ranks=ranks), RATES) for ranks in (1, 4))
    assert one.memorize_s / four.memorize_s == pytest.approx(4, rel=0.05)
    assert one.memorize_s == pytest.approx(four.memorize_s * 4, rel=0.05)


def test_a_machine_that_all_pools_share_is_bound_by_its_cores_or_its_slowest_stage() -> None:
    assert shared_questions_per_s(RATES, 2) == pytest.approx(2 / (0.1 + 0.05 + 50 * 0.001 + 0.03))
    assert shared_questions_per_s(RATES, 64) == 10.0
    assert shared_questions_per_s(RATES, 64, answer_tokens=200) == 5.0


def test_a_cluster_never_shrinks_with_load() -> None:
    plans = curve(DEMAND, SIZES, RATES, [1.0, 10.0, 100.0, 1000.0])
    assert [load for load, _ in plans] == [1.0, 10.0, 100.0, 1000.0]
    gpus = [each.gpus for _, each in plans]
    assert gpus == sorted(gpus) and gpus[-1] > 5 * gpus[0]


def run(tmp_path: Path, *arguments: str) -> tuple[int, str, str]:
    rates = tmp_path / "rates.json"
    rates.write_text(RATES.model_dump_json(), encoding="utf-8")
    common = ["plan", "--rates", str(rates), "--memories", "100", "--tokens", "100000", "--questions-per-second", "5"]
    result = CliRunner().invoke(app, [*common, *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_shows_pools_and_what_binds_first(tmp_path: Path) -> None:
    svg = tmp_path / "curve.svg"
    code, shown, _ = run(tmp_path, "--ratio", "8", "--svg", str(svg))
    assert code == 0
    for word in ("memory: 0 GPUs", "retrieval: 0 GPUs", "generator: 0 GPUs", "object store: ", "binds first: "):
        assert word in shown
    lines = [each for each in ET.parse(svg).iter() if each.tag.endswith("polyline")]
    assert len(lines) == 5 and all(len(line.attrib["points"].split()) == 7 for line in lines)
    code, shown, _ = run(tmp_path, "--json")
    assert code == 0 and json.loads(shown)["binds_first"]["pool"] in ("memory", "retrieval", "generator", "cpu")


def test_a_model_that_is_not_here_needs_its_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    code, _, error = run(tmp_path, "--profile", "cluster")
    model = "TommyChien/memorag-qwen2-7b-inst"
    assert code == 1 and f"--shape {model}=FILE" in error
    file = tmp_path / "config.json"
    config = {
        "num_hidden_layers": 28,
        "hidden_size": 3584,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
    }
    file.write_text(json.dumps(config), encoding="utf-8")
    code, shown, error = run(tmp_path, "--profile", "cluster", "--shape", f"{model}={file}", "--json")
    assert code == 0 and "the rates are those of the profile 'embedded'" in error
    assert json.loads(shown)["memory_bytes"] == (100_000 // 16 + 64) * 57_344
    code, _, error = run(tmp_path, "--shape", "nonsense")
    assert code == 1 and "--shape takes MODEL=FILE" in error
