"""What may run beside what: `make test` runs two workers, each taking whole groups of tests."""

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# Tests that start Ray, engines or servers wait for those with a limit, and each of them fills the machine: they run one
# after another, and all others beside them. The session's server, too, is then started by one worker only.
_FILLS_THE_MACHINE = (
    "tests/cluster/test_deploy.py",
    "tests/cluster/test_engine.py",
    "tests/cluster/test_routing.py",
    "tests/generator_worker/test_generator.py",
    "tests/memory_worker/catalog/test_catalog.py",
    "tests/memory_worker/recall/test_connector_parity.py",
    "tests/memory_worker/keeper/test_keeper.py",
    "tests/memory_worker/memorize/test_kinds.py",
    "tests/memory_worker/memorize/test_memorizer.py",
    "tests/memory_worker/memorize/test_ranks.py",
    "tests/memory_worker/recall/test_recaller.py",
    "tests/memory_worker/models/test_stock.py",
    "tests/retrieval_worker/test_deployments.py",
    "tests/serving/deploy/test_dry_run.py",
    "tests/system/",
)


class Groups(LoadScopeScheduling):
    """All that fill the machine are one group; of the others each module is, so that its fixtures are made once."""

    def _split_scope(self, nodeid: str) -> str:
        return "machine" if nodeid.startswith(_FILLS_THE_MACHINE) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Groups:
    """Named groups (`xdist_group`) would say the same, but xdist 3.8 writes them into ids, which pytest 9.2 ignores."""
    return Groups(config, log)
