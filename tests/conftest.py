"""What may run beside what: `make test` runs two workers, each taking whole groups of tests."""

import pytest

_SHARED_SERVER = "server"  # the session's server, which must be started once and not by each worker


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests with the shared server are one group; else a module is, so that its fixtures are made once."""
    for item in items:
        shares = _SHARED_SERVER in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group(_SHARED_SERVER if shares else item.nodeid.partition("::")[0]))
