"""One server of the tiny model for all tests that change nothing another could see."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shenhong.tokenizer.tokenizer import CHAT_TEMPLATE
from tests.conftest import Tiny
from tests.serve.running import Running, running, with_template


@pytest.fixture(scope="session")
def served(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    data = tmp_path_factory.mktemp("data")
    with running(tiny.run, data, runs=tiny.run.parent) as server:
        yield server


@pytest.fixture(scope="session")
def writer(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of a model that goes on with plain text."""
    with running(prose, tmp_path_factory.mktemp("writer")) as server:
        yield server


@pytest.fixture(scope="session")
def thinking(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose template begins every answer inside of thinking, and repeats earlier thoughts."""
    folder = tmp_path_factory.mktemp("thinking")
    template = CHAT_TEMPLATE.replace(
        "'<｜Assistant｜>' + message",
        "'<｜Assistant｜>' + (message['reasoning_content'] | default('')) + message",
    )
    model = with_template(tiny.run / "model", folder / "model", template + "<think>\n")
    with running(model, folder / "data") as server:
        yield server
