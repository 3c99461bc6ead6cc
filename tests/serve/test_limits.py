"""Bounds: of bodies before anything reads them, and of what one key may ask for in a minute."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shenhong.serve.http.faults import Fault
from shenhong.serve.http.limits import Meter, depth_of, depth_of_value, multiples_fit
from shenhong.serve.settings import Limits
from tests.conftest import Tiny
from tests.growth import LINEAR, growth
from tests.serve.running import FREE, Running, running, slowly

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def depth(value: Any) -> int:
    if not isinstance(value, list | dict):
        return 0
    inner = value if isinstance(value, list) else value.values()
    return 1 + max(map(depth, inner), default=0)


@given(JSON, st.booleans())
def test_depth_is_found_without_parsing(value: Any, ascii: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii).encode()
    assert depth_of(body) == depth_of_value(value) == depth(value)


@given(st.binary())
def test_depth_of_anything_is_a_number(body: bytes) -> None:
    assert 0 <= depth_of(body) <= len(body)


def test_depth_of_hostile_bodies_is_quick() -> None:
    assert depth_of(b"[" * 10**6) == 10**6
    assert depth_of(b'"' + b"\\" * 10**6) == 0
    assert depth_of(b'"[' * 500_000) <= 10**6
    assert growth(depth_of, lambda n: b'"' + b'\\"' * n + b"\\", 2500) < LINEAR


def test_a_minute_is_shared_evenly_and_keys_are_apart() -> None:
    now = [0.0]
    meter = Meter(Limits(requests_per_minute=3, tokens_per_minute=600), clock=lambda: now[0])
    for _ in range(3):
        meter.request("a")
    with pytest.raises(Fault) as refused:
        meter.request("a")
    assert refused.value.status == 429 and refused.value.retry_after == pytest.approx(20)
    meter.request("b")
    now[0] += 20.0
    meter.request("a")
    meter.prompt("a", 100)
    meter.written("a", 600)  # what was written is only known afterwards: a debt of 100
    with pytest.raises(Fault) as refused:
        meter.prompt("a", 10)
    assert refused.value.retry_after == pytest.approx(11)
    now[0] += 11.1
    meter.prompt("a", 10)


def test_bodies_are_bounded(served: Running) -> None:
    def post(body: bytes | Any, **headers: str) -> httpx.Response:
        head = {"content-type": "application/json", **headers}
        return served.http.post("/v1/completions", content=body, headers=head)

    most = served.hub.limits.max_body_bytes
    assert post(b" " * (most + 1)).status_code == 413

    def endless() -> Any:
        with contextlib.suppress(GeneratorExit):
            for _ in range(10 * most // 65536):
                yield b"[" * 65536

    # A body without a length is cut off where it is too large, so the client may see the cut instead.
    with contextlib.suppress(httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        assert post(endless()).status_code == 413
    for body, code in (
        (b"[" * 200_000, "body_too_deep"),
        (b'{"a":' * 1000 + b"1" + b"}" * 1000, "body_too_deep"),
        (b'{"prompt": "\xff\xfe"}', "invalid_encoding"),
        (b'{"prompt": ', "invalid_json"),
        (b'{"temperature": NaN}', "invalid_json"),
        (b"[1" + b"0" * 5000 + b"]", "invalid_json"),
        (b'{"metadata": {"a": 1e999}}', "invalid_json"),
        (b'{"metadata": {"a": "\\ud800"}}', "invalid_encoding"),
        (b'{"metadata": {"\\uDFFF": -1}}', "invalid_encoding"),
        ('{"prompt": "長"}'.encode("utf-16"), "invalid_encoding"),
    ):
        reply = post(body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, code), body[:20]
    whole = {"model": served.model, "input": "x", "max_output_tokens": 1}
    whole |= {"metadata": {"a": "\U0001f600", "b": 1e308}}
    assert served.http.post("/v1/responses", json=whole).json()["metadata"] == whole["metadata"]  # fmt: skip
    half = post(json.dumps({"model": served.model, "prompt": "\ud800"}).encode())
    assert half.status_code == 400 and half.json()["error"]["type"] == "invalid_request_error"
    assert served.chat().status_code == 200


def test_schemas_are_bounded(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(_: Any) -> Any:  # it would take for ever
        raise AssertionError("it was compiled before it was refused")

    monkeypatch.setattr(served.hub.models[served.model].llm.engine, "compiled", compiled)

    def ask(schema: Any) -> httpx.Response:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        return served.chat(response_format=form)

    deep: Any = {}
    for _ in range(40):
        deep = {"items": deep}
    whole = {"type": "integer", "multipleOf": 9_999_991}
    parts = [{"type": "integer", "multipleOf": step} for step in (9973, 9967)]
    for schema, code in (
        (deep, "schema_depth"),
        ({"enum": ["x" * 70_000]}, "schema_size"),
        (whole, "schema_multiple"),
        ({"allOf": parts}, "schema_multiple"),
    ):
        error = ask(schema).json()["error"]
        assert (error["code"], error["param"]) == (code, "response_format")


def test_as_many_choices_as_the_description_says_are_taken(served: Running) -> None:
    schema = served.app.openapi()["components"]["schemas"]["StructuredOutputs"]["properties"]
    (most,) = (
        form["maxItems"] for form in schema["choice"]["anyOf"] if form.get("type") == "array"
    )
    choices = [f"{number:020}" for number in range(most + 1)]
    reply = served.chat(structured_outputs={"choice": choices[:-1]}, max_tokens=30)
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["message"]["content"] in choices
    assert served.chat(structured_outputs={"choice": choices}).status_code == 400
    long = served.chat(structured_outputs={"choice": ["x" * 600_000]}).json()["error"]
    assert (long["code"], long["param"]) == ("schema_size", "structured_outputs")


def test_multiples_that_people_write_fit() -> None:
    for steps in ([0.01, 1000, 5], [1e-9], [1_000_000], [60, 24, 7, 365], [], [True, "x", -3, 0]):
        assert multiples_fit([{"multipleOf": step} for step in steps]), steps
    for steps in ([99_991], [1e300, 7], [0.0001, 30_011], [10**30]):
        assert not multiples_fit([{"multipleOf": step} for step in steps]), steps


def long(server: Running, **more: Any) -> dict[str, Any]:
    """A stream that does not end soon by itself."""
    ask = {"model": server.model, "prompt": "长城", "max_tokens": 110, "stream": True}
    return ask | {"logit_bias": {"1": -100}} | more


def test_what_is_refused_is_not_paid_for(tiny: Tiny, tmp_path: Any) -> None:
    limits = replace(FREE, tokens_per_minute=100, max_queue=2)
    with running(tiny.run, tmp_path, limits=limits, keys=("a" * 20,)) as server:
        ask = {"model": server.model, "prompt": [5] * 60, "max_tokens": 1}
        regex = {"structured_outputs": {"regex": "("}}
        for _ in range(3):
            reply = server.http.post("/v1/completions", json=ask | regex)
            assert reply.status_code == 400 and reply.json()["error"]["code"] == "constraint"
        assert "answers_total{" not in server.http.get("/metrics").text
        assert server.http.post("/v1/completions", json=ask).status_code == 200
        assert "answers_total{" in server.http.get("/metrics").text
        assert server.http.post("/v1/completions", json=ask).status_code == 429


def test_rates_and_queue_answer_429_with_a_time(
    tiny: Tiny, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = replace(FREE, requests_per_minute=4, max_queue=2, max_n=8)
    with running(tiny.run, tmp_path, limits=limits, keys=("a" * 20,)) as server:
        # More than the queue holds can never be answered, so asking again would not help.
        reply = server.chat(n=3)
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "n"
        slowly(monkeypatch, server)
        with server.http.stream("POST", "/v1/completions", json=long(server, n=2)) as stream:
            lines = stream.iter_lines()  # kept: the stream ends with it
            assert "text_completion" in next(lines)
            reply = server.chat()
            assert reply.status_code == 429 and reply.json()["error"]["code"] == "queue_full"
            assert int(reply.headers["retry-after"]) >= 1
        assert server.idle() and server.chat().status_code == 200
        reply = server.chat()
        assert reply.status_code == 429 and 1 <= int(reply.headers["retry-after"]) <= 16
        assert server.http.get("/health").status_code == 200
    with running(tiny.run, tmp_path, limits=limits) as server:  # no key: one local user
        assert [server.chat().status_code for _ in range(6)] == [200] * 6
