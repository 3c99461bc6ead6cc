"""One server of the tiny model for all tests that change nothing another could see."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import Tiny
from tests.serve.running import Running, running


@pytest.fixture(scope="session")
def served(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    data = tmp_path_factory.mktemp("data")
    with running(tiny.run, data, runs=tiny.run.parent) as server:
        yield server
