"""Windows spread over ranks: the same memory, the bytes that were predicted, and ranks that are lost."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray import serve
from ray.util import placement_group_table
from safetensors.torch import load_file

from cluster.config import EngineConfig
from cluster.pools.pools import PoolConfig
from memory_worker.config import MemorizeConfig, MemoryConfig
from memory_worker.errors import LostRank
from memory_worker.manifest import MemoryKey
from memory_worker.memorize.memorizer import Memorizer, memorizer_application
from memory_worker.memorize.ranks import rank_share, replica_options
from memory_worker.messages import MemorizeProgress
from memory_worker.models.beacon import BeaconModel, Slots
from memory_worker.models.beacon.exchange import count_exchanged_bytes, share_out
from memory_worker.storage.store import MemoryStore
from serving.errors import is_unavailable
from tests.support import rank_process
from tests.support.beacon_reference import write_checkpoint
from tests.support.memorizing import config_for, files_of, steps_until, stored_request
from tests.support.waiting import PATIENCE_S

TOLERANCE = 1e-4
MESSAGE = 320  # bytes that gloo writes around what it is given, at most


def run_ranks(folder: Path, ranks: int, out: Path) -> list[list[dict[str, int]]]:
    """`rank_process`, one for each rank; what each printed for each case."""

    def start(rank: int, port: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.support.rank_process", str(folder), str(rank), str(ranks), port]
        return subprocess.Popen([*command, str(out / str(rank))], stdout=subprocess.PIPE, text=True)

    first = start(0, "0")
    assert first.stdout is not None
    port = first.stdout.readline().strip()
    processes = [first, *(start(rank, port) for rank in range(1, ranks))]
    printed = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks
    return [[json.loads(line) for line in text.splitlines()] for text in printed]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.long)])
def test_ranks_make_the_memory_of_one(tmp_path: Path, ranks: int) -> None:
    folder = write_checkpoint(tmp_path / "model", beacon_window=rank_process.WINDOW)
    model = BeaconModel.from_pretrained(folder)
    slot_bytes = 2 * model.kv_heads * model.head_dim * 4
    printed = run_ranks(folder, ranks, tmp_path)
    for number, (name, documents, group_windows, ratio) in enumerate(rank_process.CASES):
        passes = list(rank_process.compressed(model, documents, group_windows, ratio))
        expected = Slots.concat([slots for parts in passes for slots in parts])
        for rank in range(ranks):
            found = load_file(tmp_path / str(rank))
            torch.testing.assert_close(found[f"{name}.keys"], expected.keys, rtol=0, atol=TOLERANCE)
            torch.testing.assert_close(found[f"{name}.values"], expected.values, rtol=0, atol=TOLERANCE)
        for facts in (cases[number] for cases in printed):
            if name == "even":  # each rank sends its share of the slots to each of the others, and nothing else
                assert facts["counted"] == (ranks - 1) * model.layers * slot_bytes * len(expected) // ranks
            messages = (ranks - 1) * model.layers * len(passes)
            assert facts["counted"] < facts["written"] <= facts["counted"] + MESSAGE * (messages + 2 * ranks)


def test_windows_are_shared_out_by_their_work() -> None:
    even = share_out([1.0 + 0.01 * number for number in range(16)], 4)
    assert sorted(index for share in even for index in share) == list(range(16))
    loads = [sum(1.0 + 0.01 * number for number in share) for share in even]
    assert [len(share) for share in even] == [4] * 4 and max(loads) < 1.02 * min(loads)
    assert share_out([5.0, 1.0, 1.0, 1.0], 2) == [[0], [1, 2, 3]]
    assert share_out([1.0], 3) == [[0], [], []]
    assert count_exchanged_bytes([16, 4], ranks=4, layers=2, slot_bytes=100) == 3 * 2 * 20 * 100


@pytest.mark.parametrize(("gpus", "tensor_parallel"), [(0, 1), (1, 1), (4, 4)])
def test_a_rank_takes_what_the_pool_gives_a_rank_of_the_engine(gpus: int, tensor_parallel: int) -> None:
    pool = PoolConfig(
        gpus_per_replica=gpus,
        cpus_per_replica=3,
        resources={"memory_node": 1.0},
        accelerator_type="H100",
        node_labels={"group": "memory"},
    )
    engine = EngineConfig(model="m", tensor_parallel_size=tensor_parallel)
    config = MemoryConfig(engine=engine, memorize=MemorizeConfig(ranks=8))
    share = rank_share(config, pool)
    assert share.pop("GPU", 0) == gpus / tensor_parallel
    assert share == {"CPU": 3, "memory_node": 1 / tensor_parallel, "accelerator_type:H100": 0.001}
    options = replica_options(config, pool)
    serve.deployment(Memorizer, **options)  # Serve's own check that the replica fits its first bundle
    assert len(options["placement_group_bundles"]) == 8
    assert options["placement_group_bundle_label_selector"] == [{"group": "memory"}]


def test_a_gpu_is_not_shared_by_ranks() -> None:
    config = MemoryConfig(engine=EngineConfig(model="m"), memorize=MemorizeConfig(ranks=4))
    with pytest.raises(ValueError, match=r"gpus_per_replica is 0\.3: set it to 1, or memorize\.ranks to 1"):
        rank_share(config, PoolConfig(gpus_per_replica=0.3))


def pid_of(actor: Any) -> int:
    pid: int = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))
    return pid


def ranked(random_model: Path, **settings: Any) -> MemoryConfig:
    return config_for(random_model, ranks=2, group_windows=1, **{"rank_timeout_s": PATIENCE_S, **settings})


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (signal.SIGKILL, "rank 1 of a Memorizer's 2 was lost: ActorDiedError"),
        pytest.param(
            signal.SIGSTOP, "rank 1 of a Memorizer's 2 was lost: it is silent", marks=pytest.mark.long, id="stopped"
        ),
    ],
)
async def test_a_lost_rank_fails_the_group_and_the_job_goes_on(
    local_ray: None, random_model: Path, tmp_path: Path, how: signal.Signals, told: str
) -> None:
    store = MemoryStore(str(tmp_path))
    one = Memorizer(config_for(random_model, group_windows=2), str(tmp_path))
    key_of_one = MemoryKey("acme", "book", "one")
    *_, by_one = await steps_until(one, stored_request(store, key_of_one))

    silence_s = 30.0 if how == signal.SIGSTOP else PATIENCE_S
    memorizer = Memorizer(ranked(random_model, rank_timeout_s=silence_s), str(tmp_path), {"CPU": 1})
    keys = {name: MemoryKey("acme", "book", name) for name in ("whole", "lost")}
    *_, whole = await steps_until(memorizer, stored_request(store, keys["whole"]))
    for segments, alone in zip(whole.segments, by_one.segments, strict=True):
        for segment, expected in zip(segments, alone, strict=True):
            assert (segment.tokens, segment.slots) == (expected.tokens, expected.slots)
            for file, other in zip(segment.files, expected.files, strict=True):
                found, wanted = (store.read_segment(each).tensors() for each in (file, other))
                torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)

    assert memorizer._ranks is not None
    request, pid = stored_request(store, keys["lost"]), pid_of(memorizer._ranks._team._actors[0])
    steps, seen, hit = memorizer.memorize(request), [], False
    with pytest.raises(LostRank, match=told) as failure:
        async for step in steps:
            assert isinstance(step, MemorizeProgress)
            seen.append(step.done_tokens)
            if not hit and len(seen) == 5:
                os.kill(pid, how)
                hit = True
    assert len(seen) < 10 and is_unavailable(failure.value)
    resumed, *_, result = await steps_until(memorizer, request)
    assert 0 < resumed.done_tokens <= seen[-1]
    assert files_of(result, keys["lost"]) == files_of(whole, keys["whole"])
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait()  # also one that was stopped is ended with the others
    ray.kill(memorizer._ranks._team._actors[0])


def rank_processes() -> set[int]:
    return {p.pid for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::Rank")}


@pytest.mark.long
async def test_served_each_rank_has_a_bundle_of_its_replica(
    local_ray: None, random_model: Path, tmp_path: Path
) -> None:
    store, others = MemoryStore(str(tmp_path)), rank_processes()
    application = memorizer_application(ranked(random_model), PoolConfig(cpus_per_replica=1), str(tmp_path))
    handle = await asyncio.to_thread(serve.run, application, name="ranked", route_prefix=None)
    memorize = handle.options(stream=True).memorize
    keys = [MemoryKey("acme", "book", version) for version in ("first", "second")]
    *_, first = [step async for step in memorize.remote(stored_request(store, keys[0]))]

    (group,) = (g for g in placement_group_table().values() if g["state"] == "CREATED")
    assert [bundle["CPU"] for bundle in group["bundles"].values()] == [1, 1]
    (process,) = rank_processes() - others
    with pytest.raises(Exception, match="rank 1") as failure:
        async for step in memorize.remote(stored_request(store, keys[1])):
            if step.done_tokens and process:  # steps that were on their way may follow
                os.kill(process, signal.SIGKILL)
                process = 0
    assert is_unavailable(failure.value)
    *_, second = [step async for step in memorize.remote(stored_request(store, keys[1]))]
    assert files_of(second, keys[1]) == files_of(first, keys[0])
