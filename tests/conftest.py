"""What may run beside what: `make test` runs two workers, each taking whole groups of tests."""

import pytest

# Tests that start Ray, engines or servers wait for those with a limit, and each of them fills the machine: they run one
# after another, and all others beside them. The session's server, too, is then started by one worker only.
_FILLS_THE_MACHINE = (
    "tests/cluster/test_deploy.py",
    "tests/cluster/test_engine.py",
    "tests/cluster/test_routing.py",
    "tests/generator_worker/test_generator.py",
    "tests/memory_worker/test_catalog.py",
    "tests/memory_worker/test_connector_parity.py",
    "tests/memory_worker/test_keeper.py",
    "tests/memory_worker/test_kinds.py",
    "tests/memory_worker/test_memorizer.py",
    "tests/memory_worker/test_ranks.py",
    "tests/memory_worker/test_recaller.py",
    "tests/memory_worker/test_stock.py",
    "tests/retrieval_worker/test_deployments.py",
    "tests/serving/test_dry_run.py",
    "tests/system/",
)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups all that fill the machine; of the others each module is a group, so that its fixtures are made once."""
    for item in items:
        group = "machine" if item.nodeid.startswith(_FILLS_THE_MACHINE) else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))
