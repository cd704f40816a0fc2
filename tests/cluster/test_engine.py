"""One real vLLM engine under Ray Serve: streaming, refusal, cancellation, death and recovery, its footprint.

It is for the long form: the Generator's tests have an engine that streams, refuses and cancels.
"""

import psutil
import pytest
import ray
from ray import serve

from cluster.engine import core_ids, engine_application
from cluster.errors import EngineFailed
from cluster.messages import Finished, Sampling, TextDelta
from cluster.pools.pools import PoolConfig
from tests.support.tiny_engine import tiny_engine
from tests.support.waiting import until, wait_until


@pytest.fixture(scope="module")
def engine(random_model, local_ray):
    config = tiny_engine(random_model, cpu_cores="0")
    everything = ray.cluster_resources()["CPU"]
    wait_until(lambda: ray.available_resources().get("CPU") == everything)  # what a test before this one had is back
    server = "cluster.engine_server.EngineServer"
    app = engine_application(server, config, PoolConfig(), name="Engine", arguments={})
    handle = serve.run(app, name="engine", route_prefix=None)
    wait_until(lambda: ray.available_resources().get("CPU") != everything)
    assert ray.available_resources()["CPU"] == everything - 1.0  # the pool's cpus_per_replica and nothing else
    yield handle
    serve.delete("engine")
    wait_until(lambda: not _engine_cores())  # nothing outlives Serve


def _engine_cores() -> list[psutil.Process]:
    """Living processes of engines that this one has started."""
    children = psutil.Process().children(recursive=True)
    return [p for p in children if "EngineCore" in p.name() and p.status() != psutil.STATUS_ZOMBIE]


def _engine_core() -> psutil.Process:
    (core,) = _engine_cores()  # scheduler and model in one process
    return core


async def _collect(engine, tokens, **options):
    return [o async for o in engine.options(stream=True).stream.remote(tokens, **options)]


@pytest.mark.long
async def test_it_streams_text_and_ends_with_what_it_cost(engine):
    *deltas, end = await _collect(engine, list(range(300, 340)), max_tokens=16, ignore_eos=True)
    assert end == Finished(40, 16, "length")
    assert len(deltas) > 4 and all(isinstance(d, TextDelta) and d.text for d in deltas)
    again = await _collect(engine, list(range(300, 340)), max_tokens=16, ignore_eos=True)
    assert "".join(d.text for d in again[:-1]) == "".join(d.text for d in deltas)


@pytest.mark.long
async def test_a_stop_string_ends_it_and_is_left_out(engine):
    *deltas, _ = await _collect(engine, list(range(300, 340)), max_tokens=32, ignore_eos=True)
    text = "".join(d.text for d in deltas)
    stop = text[len(text) // 2 :][:4]
    *short, end = await _collect(
        engine, list(range(300, 340)), max_tokens=32, ignore_eos=True, sampling=Sampling(stop=(stop,))
    )
    assert end.reason == "stop" and "".join(d.text for d in short) == text[: text.index(stop)]


@pytest.mark.long
async def test_too_long_a_prompt_is_refused_with_the_limit(engine):
    with pytest.raises(ValueError, match="1024"):
        await _collect(engine, [300] * 1100, max_tokens=4)


@pytest.mark.long
async def test_the_engine_stays_on_its_core(engine):
    assert _engine_core().cpu_affinity() == [0]


@pytest.mark.long
async def test_a_cancelled_request_is_aborted_in_the_engine(engine):
    response, other = (
        engine.options(stream=True).stream.remote([301, 302 + n], max_tokens=900, ignore_eos=True) for n in range(2)
    )
    for _ in range(151):
        await anext(response)
    response.cancel()
    for _ in range(375):  # half of what was left to write then, and as fast as that would be written
        await anext(other)
        if (await engine.stats.remote()).requests < 2:
            break
    assert (await engine.stats.remote()).requests == 1, "the cancelled one goes on"
    other.cancel()

    async def idle() -> bool:
        stats = await engine.stats.remote()
        return not stats.requests and not stats.working

    await until(idle)


@pytest.mark.long
async def test_a_dead_engine_is_a_clear_error(engine):
    response = engine.options(stream=True).stream.remote([301, 302], max_tokens=900, ignore_eos=True)
    await anext(response)
    _engine_core().kill()
    with pytest.raises(EngineFailed, match="died"):
        async for _ in response:
            pass


@pytest.mark.long
async def test_a_dead_engine_is_replaced(engine):
    for core in _engine_cores():
        core.kill()

    async def answered() -> Finished | None:  # Serve says nowhere when a replica has been replaced
        try:
            return (await _collect(engine, [301, 302], max_tokens=4, ignore_eos=True))[-1]
        except (EngineFailed, ray.exceptions.RayActorError, serve.exceptions.DeploymentUnavailableError):
            return None

    assert await until(answered) == Finished(2, 4, "length")


def test_core_lists_are_read_as_taskset_reads_them():
    assert core_ids("0-2,5") == {0, 1, 2, 5}
