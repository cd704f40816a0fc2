"""Plans: each need is what its rates say, the fullest binds, and the command line shows it."""

import json
import math
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.planning.costs import ModelShape, PlanError
from cluster.planning.estimates import (
    Assumptions,
    Engine,
    Processor,
    estimate_memorize_flops,
    estimate_writing,
    find_gpu,
    known_gpus,
)
from cluster.planning.plan import Demand, Rates, Replica, Sizes, curve, plan, shared_questions_per_s
from serving import config
from serving.cli.main import app
from serving.config import load_profile, profile_names
from serving.planning.sizes import NodeType, read_shape, sizes_of

SHAPE = ModelShape(
    layers=4, hidden=256, heads=4, kv_heads=2, head_dim=64, mlp=768, vocabulary=4096, tied=True, window=512
)
RATES = Rates(
    profile="embedded",
    machine="a machine",
    memorize_flops=1e12,
    recall_questions_per_s=10.0,
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
    beacon, full, gist, pruned = (
        plan(replace(DEMAND, kind=kind, ratio=ratio), SIZES, RATES)
        for kind, ratio in (("beacon", 8), ("full", 1), ("gist", 8), ("pruned", 8))
    )
    assert (beacon.slots, full.slots, gist.slots, pruned.slots) == (64_064, 512_064, 64_064, 64_064)
    assert pruned.memorize_s > gist.memorize_s
    assert full.memory_bytes == 512_064 * SHAPE.slot_bytes
    assert gist.memorize_s < full.memorize_s
    for alone, kind in ((gist, "gist"), (pruned, "pruned")):
        shared = plan(replace(DEMAND, kind=kind), replace(SIZES, ranks=4), RATES)
        assert shared.memorize_s == alone.memorize_s, "they are made by one rank"


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


def test_data_sheets_are_whole_and_found_by_either_name() -> None:
    assert {"a100-40", "a100-80", "h100", "h200", "b200", "l4", "l40s", "a10g", "rtx4090", "mi300x"} <= {*known_gpus()}
    assert find_gpu("H100") == find_gpu("h100") and find_gpu("A100-80G").memory_gb == 80
    assert all(gpu.memory_gb and gpu.source for gpu in known_gpus().values())
    with pytest.raises(PlanError, match="did you mean a100-40 or a100-80"):
        find_gpu("a100")


def test_estimates_follow_what_binds_the_work() -> None:
    """Writing follows the memory's bandwidth, reading the FLOP/s; a shared GPU does its share of both."""
    assumed, h100, h200 = Assumptions(step_s=0.0), find_gpu("h100"), find_gpu("h200")
    model = replace(SHAPE, layers=28, hidden=3584, heads=28, kv_heads=4, head_dim=128, mlp=18944, vocabulary=152064)

    def written(gpu: Processor, prompt: float = 0.0) -> float:
        return estimate_writing(Engine(model, gpu), assumed, tokens=200, prompt=prompt, context=1000)

    assert written(h200) / written(h100) == pytest.approx(4800 / 3350)
    assert written(h100.times(0.5)) == pytest.approx(written(h100) / 2)
    read = model.weight_bytes + assumed.requests_in_flight * 1000 * model.slot_bytes
    assert written(h100) == pytest.approx(assumed.requests_in_flight * 0.6 * 3.35e12 / read)
    assert written(h100, prompt=1e9) == pytest.approx(200 * 0.4 * 989e12 / (2e9 * model.matrix_parameters), rel=1e-2)
    kinds = {kind: estimate_memorize_flops(Engine(model, h100), assumed, kind, 16, 8) for kind in ("beacon", "gist")}
    assert kinds["beacon"] == 0.4 * 989e12 > 2 * kinds["gist"], "a gist is written token by token"


PLANNED = ("--memories", "10000", "--tokens", "200000", "--questions-per-second", "50", "--json")


def planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> tuple[int, str, str]:
    """`memorag plan` on a machine that reaches no hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    result = CliRunner().invoke(app, ["plan", *arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("profile", profile_names())
def test_without_rates_a_plan_is_an_estimate(profile: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    code, shown, error = planned(monkeypatch, tmp_path, "--profile", profile, *PLANNED)
    assert code == 0, error
    found = json.loads(shown, parse_constant=refuse)
    assert found["estimate"] is True and found["assumptions"]["memorize_share"] == 0.4
    assert found["nodes"] >= 3 and (found["gpus"] > 0) == (profile in ("cluster", "single-gpu"))
    assert ("h100" in found["rates"]["machine"]) == (found["gpus"] > 0)
    code, shown, _ = planned(monkeypatch, tmp_path, "--profile", profile, *PLANNED[:-1])
    assert code == 0 and shown.startswith("ESTIMATE: nothing was measured")


def test_a_faster_gpu_makes_a_smaller_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpus = {}
    for name in ("l40s", "a100-80", "h100", "b200"):
        code, shown, error = planned(monkeypatch, tmp_path, "--profile", "cluster", "--gpu", name, *PLANNED)
        assert code == 0, error
        gpus[name] = json.loads(shown)["gpus"]
    assert gpus["l40s"] > gpus["a100-80"] > gpus["h100"] > gpus["b200"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--profile", "cluster", "--gpu", "l4"), 1, "do not fit the 43.2 GB that its engine has of 2 l4"),
        (("--profile", "single-gpu", "--gpu", "l4"), 1, "leave no room for a KV cache: raise memory.engine"),
        (("--profile", "cluster", "--gpu", "h10"), 1, "did you mean h100"),
        (("--gpu", "h100", "--rates", "rates.json"), 2, "give one of the two"),
        (("--rates", "rates.json"), 1, "holds no rates (profile: Field required): write it with 'memorag calibrate'"),
    ],
)
def test_what_cannot_be_planned_is_said(
    arguments: tuple[str, ...], code: int, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rates.json").write_text("{}", encoding="utf-8")
    found, shown, error = planned(monkeypatch, tmp_path, *arguments, *PLANNED)
    assert found == code and not shown
    assert says in " ".join(error.replace("│", " ").split())


def test_vllms_share_is_of_the_whole_gpu(tmp_path: Path) -> None:
    """The profile `single-gpu` was refused always: 0.35 was taken of the 0.3 GPUs of a replica."""
    profile = load_profile("single-gpu")
    shape = read_shape(profile.memory.engine.model, {})
    sizes = sizes_of(profile, NodeType(8, 16, gpu_bytes=80e9), {})
    assert sizes.kv_bytes == pytest.approx(0.35 * 80e9 - shape.weight_bytes)
    assert sizes.recaller.per_node == 24, "a share is of one GPU: three fit it, and none lies across two"
    code, shown, error = run(tmp_path, "--profile", "single-gpu", "--json")
    assert code == 0, error
    assert json.loads(shown)["estimate"] is False


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
    model = "nobody/memory-model"
    profile = tmp_path / "own.yaml"
    shipped = (Path(config.__file__).parent / "profiles" / "cluster.yaml").read_text(encoding="utf-8")
    profile.write_text(shipped.replace("TommyChien/memorag-qwen2-7b-inst", model), encoding="utf-8")
    code, _, error = run(tmp_path, "--profile", str(profile))
    assert code == 1 and f"--shape {model}=FILE" in error
    file = tmp_path / "config.json"
    content = {
        "num_hidden_layers": 28,
        "hidden_size": 3584,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
    }
    file.write_text(json.dumps(content), encoding="utf-8")
    code, shown, error = run(tmp_path, "--profile", str(profile), "--shape", f"{model}={file}", "--json")
    assert code == 0 and "the rates are those of the profile 'embedded'" in error
    assert json.loads(shown)["memory_bytes"] == (100_000 // 16 + 64) * 57_344
    code, _, error = run(tmp_path, "--shape", "nonsense")
    assert code == 1 and "--shape takes MODEL=FILE" in error
