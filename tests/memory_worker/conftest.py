"""What real engines make of memories: seen once, in one process, for all tests that ask."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.scenarios import run_scenario


@pytest.fixture(scope="session")
def seen_by_engines(ray_session: str, random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_scenario("engine_scenarios", tmp_path_factory.mktemp("engines"), random_model, ray_session)


@pytest.fixture(scope="session")
def seen_in_long(ray_session: str, random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """With engines that the others have no need of."""
    return run_scenario("engine_scenarios", tmp_path_factory.mktemp("long"), random_model, ray_session, "long")
