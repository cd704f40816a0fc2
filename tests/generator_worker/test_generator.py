"""Both generators, real: vLLM through Ray Serve, and a second server that speaks OpenAI's protocol."""

import asyncio
import os
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest
from ray import serve

from cluster.engine import engine_application
from cluster.messages import TextDelta
from cluster.pools.pools import PoolConfig
from generator_worker import generator
from generator_worker.config import GeneratorConfig, RemoteConfig
from generator_worker.errors import GenerationFailed, QuestionTooLong
from generator_worker.generator import generator_application
from generator_worker.messages import GenerateRequest, Generation, Source, SourcesRead
from generator_worker.remote import RemoteGenerator
from tests.support.tiny_engine import tiny_engine
from tests.support.waiting import PATIENCE_S, until, wait_until

KEY_NAME = "GENERATOR_TEST_KEY"  # which `ray_session` sets
REQUEST = GenerateRequest(
    task="answer",
    question="Who opened the gate?",
    sources=tuple(Source(f"Passage {i} tells of the gate. " * 3, i) for i in range(4)),
    language="en",
    max_tokens=24,
    cache_salt="tenant",
)


@pytest.fixture(scope="module")
def model(random_model):
    return random_model


@pytest.fixture(scope="module")
def endpoint(local_ray, model, tmp_path_factory):
    """A vLLM server of its own."""
    port = _free_port()
    folder = tmp_path_factory.mktemp("endpoint")
    log = (folder / "log").open("wb")
    options = (
        f"--model {model} --served-model-name tiny --host 127.0.0.1 --port {port} --dtype float32 --enforce-eager "
        "--max-model-len 1024 --block-size 32 --max-num-seqs 8"
    )
    key = os.environ[KEY_NAME]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--api-key",
            key,
            *options.split(),
        ],
        env=os.environ
        | {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", "TMPDIR": str(folder)},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    yield process, f"http://127.0.0.1:{port}/v1", log.name
    family = [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else [process]
    process.terminate()
    process.wait()
    psutil.wait_procs([p for p in family if isinstance(p, psutil.Process)], PATIENCE_S)
    log.close()


@pytest.fixture(scope="module")
def local(local_ray, model):
    config = GeneratorConfig(engine=tiny_engine(model), max_answer_tokens=40)
    with pytest.MonkeyPatch.context() as patch:
        watched = "tests.support.watched_generator.WatchedGenerator"
        patch.setattr(
            generator, "engine_application", lambda _, *a, **options: engine_application(watched, *a, **options)
        )
        app = generator_application(config, PoolConfig(cpus_per_replica=1))
    return serve.run(app, name="local", route_prefix=None).options(stream=True)


@pytest.fixture(scope="module")
def url(endpoint):
    """The endpoint's, once it listens."""
    process, url, log = endpoint
    _wait_for(url.removesuffix("/v1") + "/health", process, log)
    return url


@pytest.fixture(scope="module")
def remote(local_ray, model, url):
    app = generator_application(_remote_config(model, url), PoolConfig(cpus_per_replica=0.1))
    return serve.run(app, name="remote", route_prefix=None).options(stream=True)


def _remote_config(folder, url, **changes):
    settings = {
        "base_url": url,
        "model": "tiny",
        "tokenizer": str(folder),
        "max_model_len": 1024,
        "api_key_env": KEY_NAME,
    }
    return GeneratorConfig(remote=RemoteConfig.model_validate(settings | changes), max_answer_tokens=40)


async def _collect(handle, request):
    read, *deltas, end = [item async for item in handle.generate.remote(request)]
    assert all(isinstance(delta, TextDelta) for delta in deltas) and isinstance(end, Generation)
    assert isinstance(read, SourcesRead) and end.text == "".join(delta.text for delta in deltas)
    return end, read.sources, len(deltas)


async def test_our_own_engine_streams_an_answer(local):
    end, sources, deltas = await _collect(local, REQUEST)
    assert deltas > 2 and sources == (0, 1, 2, 3) and end.finish_reason in ("stop", "length")
    assert 0 < end.completion_tokens <= 24 and end.prompt_tokens > 100


async def test_tenants_share_no_prefix_cache(local):
    cached = []
    for salt in ("one", "one", "another", "one"):
        await _collect(local, replace(REQUEST, cache_salt=salt))
        cached.append(await local.options(stream=False).cached_tokens.remote())
    first, again, other, later = cached
    assert first == other == 0 and again == later > 100


async def test_what_does_not_fit_is_left_out_and_said(local):
    many = replace(REQUEST, sources=tuple(replace(REQUEST.sources[0], score=i) for i in range(100)))
    end, sources, _ = await _collect(local, many)
    assert 10 < len(sources) < 100 and end.prompt_tokens + 24 <= 1024
    assert sources == tuple(range(100 - len(sources), 100))


async def test_a_question_too_long_is_its_own_error(local):
    with pytest.raises(QuestionTooLong, match="1024"):
        await _collect(local, replace(REQUEST, question="gate " * 1500))


async def test_sixteen_at_once_answer_as_one_alone(local):
    requests = [replace(REQUEST, question=f"Who opened gate number {i}?") for i in range(16)]
    alone = [(await _collect(local, request))[0].text for request in requests[:3]]
    together = await asyncio.gather(*[_collect(local, request) for request in requests])
    assert [end.text for end, *_ in together[:3]] == alone


@pytest.mark.parametrize("name", ["local", pytest.param("remote", marks=pytest.mark.long)])
async def test_a_client_that_stops_stops_the_engine(name, request):
    handle = request.getfixturevalue(name)
    stats = handle.options(stream=False).stats
    response, other = (
        handle.generate.remote(replace(REQUEST, question=f"Who opened gate {n}?", max_tokens=480)) for n in range(2)
    )
    for _ in range(50):
        await anext(response)
    response.cancel()
    for _ in range(215):  # half of what was left to write then, and as fast as that would be written
        await anext(other)
        if (await stats.remote()).requests < 2:
            break
    assert (await stats.remote()).requests == 1, "the cancelled one goes on"
    other.cancel()
    await until(idle(stats))


def idle(stats):
    async def nothing_runs():
        now = await stats.remote()
        return not now.requests and not now.working

    return nothing_runs


@pytest.mark.long
async def test_the_endpoint_answers_as_our_own_engine_does(local, remote):
    for request in (REQUEST, replace(REQUEST, task="summarize", question="", language="zh")):
        ours, *_ = await _collect(local, request)
        theirs, _, deltas = await _collect(remote, request)
        assert deltas > 2 and theirs == ours  # text, citations, token counts, finish reason


@pytest.mark.long
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"api_key_env": "PATH"}, r"refuses the key.*PATH"),
        ({"model": "gpt-none"}, r"gpt-none.*answered with an error.*does not exist"),
    ],
    ids=["wrong key", "unknown model"],
)
async def test_what_is_wrong_with_an_endpoint_is_named(model, url, changes, message):
    generator = RemoteGenerator(_remote_config(model, url, **changes))
    with pytest.raises(GenerationFailed, match=message):
        async for _ in generator.generate(REQUEST):
            pass


async def test_an_endpoint_where_nobody_is_is_named(local_ray, model):
    generator = RemoteGenerator(_remote_config(model, "http://127.0.0.1:9/v1"))
    with pytest.raises(GenerationFailed, match=r"127.0.0.1:9/v1.*cannot be reached"):
        async for _ in generator.generate(REQUEST):
            pass


def test_a_key_that_is_not_set_is_named(model):
    with pytest.raises(ValueError, match="NO_SUCH_KEY"):
        RemoteGenerator(_remote_config(model, "http://127.0.0.1:9/v1", api_key_env="NO_SUCH_KEY"))


@pytest.mark.long
async def test_an_endpoint_that_dies_in_the_middle_is_an_error_and_no_answer(remote, endpoint):
    response = remote.generate.remote(replace(REQUEST, max_tokens=480))
    await anext(response)
    process = psutil.Process(endpoint[0].pid)
    for child in process.children(recursive=True):
        child.kill()
    process.kill()
    with pytest.raises(GenerationFailed):
        async for _ in response:
            pass


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def _wait_for(url: str, process: subprocess.Popen, log: str) -> None:
    def answers() -> bool:
        assert process.poll() is None, "the endpoint did not start:\n" + Path(log).read_text(errors="replace")[-2000:]
        with suppress(httpx.TransportError):
            return httpx.get(url, timeout=PATIENCE_S).is_success
        return False

    wait_until(answers, progress=lambda: Path(log).stat().st_size)
