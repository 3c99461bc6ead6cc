"""The API's own description, and what schemathesis finds by it: no answer is a crash, errors have their shape."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.conftest import Tiny
from tests.serve.running import Running, running


@pytest.fixture(scope="module")
def fuzzed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server of its own: what is found here may fill its chats."""
    with running(tiny.run, tmp_path_factory.mktemp("fuzzed"), runs=tiny.run.parent) as server:
        yield server


@pytest.fixture(scope="module")
def described(fuzzed: Running) -> Any:
    return schemathesis.openapi.from_dict(fuzzed.http.get("/openapi.json").json())


def test_the_description_names_every_route(served: Running) -> None:
    paths = served.http.get("/openapi.json").json()["paths"]
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/tokenize", "/api/jobs/{job}/events"):  # fmt: skip
        assert path in paths


ENDLESS = ("/api/events", "/api/runs/{run}/events")
FEW = settings(
    max_examples=12,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    database=None,
)


def test_nothing_described_crashes(described: Any, fuzzed: Running) -> None:
    codes: Counter[int] = Counter()
    for found in described.get_all_operations():
        operation = found.ok()
        if operation.path in ENDLESS:
            continue

        @FEW
        @given(operation.as_strategy())
        def ask(case: Any) -> None:
            if isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = fuzzed.model  # so that more than a 404 comes of it
            reply = case.call(base_url=fuzzed.url, timeout=30)
            codes[reply.status_code] += 1
            assert reply.status_code < 500, (case.path, case.body, reply.text)
            if reply.status_code >= 400:
                error = reply.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}, reply.text

        ask()
    assert codes[200] > 20 and codes[400] + codes[404] > 20, codes
    assert fuzzed.idle()
