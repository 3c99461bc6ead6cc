"""What one request may cost: its work is done beside the event loop, in time as its length, and what is too much is refused before."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from starlette.datastructures import Headers
from tokenizers import AddedToken

from shenhong.serve.http import bodies, faults
from shenhong.serve.http import limits as limits_module
from shenhong.serve.http.guard import COOKIE, Keys
from shenhong.serve.http.limits import multiples_fit
from shenhong.serve.openai import constraints
from shenhong.tokenizer import Tokenizer
from tests.conftest import Tiny
from tests.growth import LINEAR, growth
from tests.serve.running import FREE, Running, running

MANY = 400_000  # bytes or so of a hostile body


def loop_seconds(server: Running) -> float:
    """Processor time of the event loop's thread until now."""

    async def spent() -> float:
        return time.thread_time()

    loop = server.hub.models[server.model].thread._loop
    return asyncio.run_coroutine_threadsafe(spent(), loop).result(60)


@pytest.fixture(scope="module")
def simplifying(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose model's corpus was simplified, with a key, so that /api/login is what it is."""
    limits = replace(FREE, max_body_bytes=2**20)
    with running(tiny.run, tmp_path_factory.mktemp("work"), limits=limits) as server:
        assert server.hub.models[server.model].llm.tokenizer.simplify
        yield server


def user(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 1}


SCHEMA = {"anyOf": [{"multipleOf": 10**20 + number} for number in range(MANY // 40)]}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
ANSWERED = ("blanks", "tokenize", "detokenize")
HOSTILE: dict[str, tuple[str, Any]] = {
    "blanks": ("/v1/chat/completions", user(" " * MANY + "x")),
    "marks": ("/v1/chat/completions", user("e" + "\u0301\u0316" * (MANY // 4))),
    "names": ("/v1/chat/completions", user("<" * MANY)),
    "fields": ("/v1/chat/completions", user("x") | {f"f{n}": 1 for n in range(MANY // 10)}),
    "messages": ("/v1/chat/completions", {"messages": [{}] * (MANY // 4)}),
    "schema": ("/v1/chat/completions", user("x") | {"response_format": FORM}),
    "lists": ("/v1/completions", {"prompt": [[]] * (MANY // 4)}),
    "prompts": ("/v1/completions", {"prompt": ["x"] * (MANY // 5)}),
    "text": ("/v1/completions", {"prompt": "長 " * (MANY // 4)}),
    "input": ("/v1/responses", {"input": [{"role": "user", "content": "x"}] * (MANY // 40)}),
    "tokenize": ("/tokenize", {"prompt": "a!" * (MANY // 2), "return_token_strs": True}),
    "detokenize": ("/detokenize", {"tokens": [5] * (MANY // 3)}),
    "arguments": ("/v1/chat/completions", user("x") | {"tools": [[]] * (MANY // 4)}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_the_event_loop_goes_on(kind: str, simplifying: Running) -> None:
    path, body = HOSTILE[kind]
    content = json.dumps({"model": simplifying.model} | body, ensure_ascii=False).encode()
    before = loop_seconds(simplifying)
    reply = simplifying.http.post(path, content=content, headers={"Content-Type": "application/json"})  # fmt: skip
    spent = loop_seconds(simplifying) - before
    assert reply.status_code == (200 if kind in ANSWERED else 400), reply.text
    assert spent < 0.15  # where it is done there it takes from a few tenths of a second to minutes


def test_a_cookie_is_read_in_time_as_its_length(simplifying: Running) -> None:
    """Before any key is asked for, and by nothing behind the guard."""
    cookie = {"Cookie": f'{COOKIE}="' + "\\" * 50_000 + '"'}
    before = loop_seconds(simplifying)
    assert simplifying.http.get("/api/chats", headers=cookie).status_code == 200
    assert loop_seconds(simplifying) - before < 0.15
    keys = Keys(["a" * 20])

    def owner(cookie: str) -> str | None:
        return asyncio.run(keys.owner(Headers({"cookie": cookie}), ""))

    owned = owner(f"x=1; {COOKIE}={asyncio.run(keys.login('a' * 20, ''))}; y=2")
    assert owned and not owner(f"x={COOKIE}")
    assert growth(owner, lambda n: f'{COOKIE}="' + "\\" * n, 2000) < LINEAR


def test_short_bodies_are_enough_where_nothing_long_is_said(simplifying: Running) -> None:
    def post(path: str, size: int) -> int:
        return simplifying.http.post(path, json={"key": "x" * size}).status_code

    assert post("/api/login", 5000) == 413
    assert post("/api/login", 1000) == 204
    chat = simplifying.http.post("/api/chats", json={}).json()["id"]
    assert post("/api/chats", 20_000) == post(f"/api/jobs/{chat}/stop", 20_000) == 413
    kept = simplifying.http.post(f"/api/chats/{chat}/texts", json={"text": "x" * 100_000})
    assert kept.status_code == 200


def test_prompts_and_schemas_are_counted_and_weighed_first(
    simplifying: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("it was looked at before it was refused")

    monkeypatch.setattr(Tokenizer, "encode", never)
    monkeypatch.setattr(constraints, "depth_of_value", never)
    monkeypatch.setattr(constraints, "multiples_fit", never)
    for kind in ("prompts", "schema"):
        path, body = HOSTILE[kind]
        reply = simplifying.http.post(path, json={"model": simplifying.model} | body)
        assert reply.status_code == 400, reply.text
    several = {"model": simplifying.model, "prompt": ["x"] * 9, "n": 2}
    error = simplifying.http.post("/v1/completions", json=several).json()["error"]
    assert (error["code"], error["param"]) == ("too_many", "n")


def test_one_fault_is_told_of_many(simplifying: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []

    def counting(error: Any) -> Any:
        told.append(len(error.errors()))
        return faults.from_validation(error)

    monkeypatch.setattr(bodies, "from_validation", counting)
    for kind in ("fields", "lists", "messages", "arguments"):
        path, body = HOSTILE[kind]
        simplifying.http.post(path, json={"model": simplifying.model} | body)
    verse = {"type": "verse", "form": "x", "title": "x", "lines": [{}] * 100} | {
        f"f{n}": 1 for n in range(10_000)
    }
    message = {"id": "a", "parent": None, "role": "user", "parts": [verse] * 100}
    reply = simplifying.http.post("/api/chats/import", json={"messages": [message]})
    assert reply.status_code == 400
    assert len(told) == 5 and max(told) < 20


def test_many_multiples_are_not_multiplied_out() -> None:
    steps = [{"multipleOf": 10**20 + number} for number in range(3000)]
    before = limits_module.math.lcm
    largest = [0]

    def watched(*numbers: int) -> int:
        found = before(*numbers)
        largest[0] = max(largest[0], found.bit_length())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits_module.math, "lcm", watched)
        assert not multiples_fit(steps)
        assert multiples_fit([{"multipleOf": 2**40}, {"multipleOf": 10**20}]) is False
        assert multiples_fit([{"multipleOf": 10**n} for n in range(20)])
    assert largest[0] < 1000


def test_names_of_special_tokens_are_looked_for_where_marks_are(tiny: Tiny) -> None:
    """However many names there are, and whatever stands before them."""
    seconds = []
    for names in (8, 512):
        tokenizer = Tokenizer.load(tiny.run / "model")
        tokenizer.backend.add_special_tokens(
            [
                AddedToken(f"<|r{n}|>", special=True, normalized=False, single_word=True)
                for n in range(names)
            ]
        )
        tokenizer = Tokenizer(tokenizer.backend)
        assert tokenizer._told(f"a<{tokenizer.mark}|r7|>") == f"a<{tokenizer.mark}|r7|>"
        secret = tokenizer._secret["<|r7|>"]
        assert tokenizer._told(f" <{tokenizer.mark}|r7|><|r7|>") == f" {secret}<|r7|>"
        begun = time.thread_time()
        tokenizer._told("<" * 100_000)
        seconds.append(time.thread_time() - begun)
    assert seconds[1] < 10 * max(seconds[0], 0.002)


@pytest.mark.parametrize("piece", [" ", "<", "e\u0301\u0316", "長", "\n"])
def test_a_prompt_is_read_in_time_as_its_length(piece: str, simplifying: Running) -> None:
    template = simplifying.hub.models[simplifying.model].template

    def read(text: str) -> None:
        variables = {"messages": [{"role": "user", "content": text}], "tools": None}
        template._asks(variables)

    assert growth(read, lambda n: piece * n + "x", 2500) < LINEAR
