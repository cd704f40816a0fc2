"""What may run beside what, and the Ray that all tests of parts share."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# Tests that start Ray, engines or servers: two groups, each run by one worker, one test after another. What a group
# starts is started once and shared by all its modules; all other tests run beside them.
ON_THE_SERVER = (
    "tests/memory_worker/keeper/test_keeper.py",  # has a Ray of two nodes, and a process is connected to one
    "tests/system/",
)
ON_RAY = (
    "tests/cluster/test_deploy.py",
    "tests/cluster/test_engine.py",
    "tests/cluster/test_routing.py",
    "tests/generator_worker/test_generator.py",
    "tests/memory_worker/catalog/test_catalog.py",
    "tests/memory_worker/memorize/test_kinds.py",
    "tests/memory_worker/memorize/test_memorizer.py",
    "tests/memory_worker/memorize/test_ranks.py",
    "tests/memory_worker/models/test_stock.py",
    "tests/memory_worker/recall/test_connector_parity.py",
    "tests/memory_worker/recall/test_head_budgets.py",
    "tests/memory_worker/recall/test_recaller.py",
    "tests/retrieval_worker/test_deployments.py",
    "tests/serving/deploy/test_dry_run.py",
)

KEY_NAME = "GENERATOR_TEST_KEY"  # environment variable of the key that the generator's tests have


class Groups(LoadScopeScheduling):
    """Of the tests that are in neither group each module is one, so that its fixtures are made once."""

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(ON_THE_SERVER):
            return "server"
        return "ray" if nodeid.startswith(ON_RAY) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Groups:
    """Named groups (`xdist_group`) would say the same, but xdist 3.8 writes them into ids, which pytest 9.2 ignores."""
    return Groups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The two groups come first, so that both workers begin with one.

    Of those on a server, tests with one of their own come before the session's has started, for two fill the memory;
    then those on the session's; last those that turn API keys on there.
    """

    def rank(item: pytest.Item) -> tuple[int, bool, bool]:
        group = 0 if item.nodeid.startswith(ON_THE_SERVER) else 1 if item.nodeid.startswith(ON_RAY) else 2
        fixtures = getattr(item, "fixturenames", ())
        return group, "server" in fixtures, "keyed" in fixtures

    items.sort(key=rank)


class SayAtOnce:
    """Names each test that fails when it does, so that a run that is cut short has said what had failed."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:  # a worker has none
            terminal.write_line("")
            terminal.write_line(f"{report.outcome.upper()} in {report.when}: {report.nodeid}", red=True)


def pytest_collection_finish() -> None:
    """The models here are small: a second thread of torch would wait for the first more than it computes."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SayAtOnce(config))


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model, made once for all workers; whoever changes its files copies them first."""
    from benchmarks.support.random_model import ensure_random_model

    folder = tmp_path_factory.getbasetemp()
    return ensure_random_model((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "models")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[str]:
    """Its address, for other processes of the tests."""
    import ray
    from ray import serve

    from benchmarks.support.recall_engine import ray_of_its_own

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_NAME, "correct horse")  # what Ray starts has the environment of now
        with ray_of_its_own():
            serve.start(proxy_location="Disabled")
            yield ray.get_runtime_context().gcs_address


@pytest.fixture(scope="module")
def local_ray(ray_session: str) -> Iterator[None]:
    """This process is connected to a Ray with Serve and eight logical CPUs, and nothing else runs there."""
    from benchmarks.support.own_ray import empty_ray

    yield
    empty_ray()
