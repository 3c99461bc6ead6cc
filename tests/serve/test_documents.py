"""The page's API where a chat is one document: what follows is what /v1/completions gives, and nothing is asked."""

from __future__ import annotations

from typing import Any

import pytest

from shenhong.errors import RequestError
from tests.serve.running import Running

WIDE = {"temperature": 1.0, "max_tokens": 12}


def turn(server: Running, chat: str, text: str | None, parent: str | None, **how: Any) -> Any:
    settings = WIDE | {"plain": True} | how
    target = {"model": server.model, "settings": settings}
    body = {"text": text, "parent": parent, "targets": [target]}
    reply = server.http.post(f"/api/chats/{chat}/turns", json=body)
    assert reply.status_code == 200, reply.text
    assert server.idle()
    return reply.json()


def new(server: Running) -> str:
    return server.http.post("/api/chats", json={}).json()["id"]


def texts(server: Running, chat: str) -> list[str]:
    messages = server.http.get(f"/api/chats/{chat}").json()["messages"]
    return ["".join(part["text"] for part in message["parts"]) for message in messages]


def completed(server: Running, prompt: str, seed: int) -> str:
    body = {"model": server.model, "prompt": prompt, "seed": seed} | WIDE
    return server.http.post("/v1/completions", json=body).json()["choices"][0]["text"]


def test_the_page_is_told_which_models_chat(writer: Running, served: Running) -> None:
    for server, chats in ((writer, False), (served, True)):
        (model,) = server.http.get("/api/bootstrap").json()["models"]
        assert model["chat"] is chats


def test_a_document_is_gone_on_with_as_it_stands(writer: Running) -> None:
    chat, begin = new(writer), " The climate  is\n"
    first = turn(writer, chat, begin, None, seed=5)
    turn(writer, chat, None, first["answers"][0]["id"], seed=6)
    piece = completed(writer, begin, 5)
    found = [begin, piece, completed(writer, begin + piece, 6)]
    assert piece and texts(writer, chat) == found
    turn(writer, chat, None, first["user"]["id"], seed=7)  # another one in the same place
    turn(writer, chat, " And so", first["answers"][0]["id"], seed=8)
    added = [
        completed(writer, begin, 7),
        " And so",
        completed(writer, begin + piece + " And so", 8),
    ]
    assert texts(writer, chat) == found + added
    exported = writer.http.get(f"/api/chats/{chat}/export?format=markdown").text
    assert exported == begin + piece + " And so" + added[-1] + "\n"
    whole = writer.http.get(f"/api/chats/{chat}/export").json()
    again = writer.http.post("/api/chats/import", json=whole).json()
    assert texts(writer, again["id"]) == found + added


def test_an_edit_is_kept_without_an_answer(writer: Running) -> None:
    chat = new(writer)
    first = writer.http.post(f"/api/chats/{chat}/texts", json={"text": "As it is"}).json()
    more = {"text": " and was", "parent": first["id"]}
    second = writer.http.post(f"/api/chats/{chat}/texts", json=more).json()
    assert texts(writer, chat) == ["As it is", " and was"]
    found = writer.http.get(f"/api/chats/{chat}").json()
    assert (found["leaf"], found["title"]) == (second["id"], "As it is")
    for where, body, status in ((chat, more | {"parent": "x"}, 400), ("none", more, 404)):
        assert writer.http.post(f"/api/chats/{where}/texts", json=body).status_code == status


def test_of_a_long_document_its_end_is_read(writer: Running) -> None:
    words = "The land is wide. " * 200
    with pytest.raises(RequestError, match="reads"):
        writer.hub.models[writer.model].llm.generate(words)
    chat = new(writer)
    turn(writer, chat, words + "At the end", None, seed=2)
    (_, message) = writer.http.get(f"/api/chats/{chat}").json()["messages"]
    context = writer.hub.models[writer.model].context
    assert message["state"] == "done" and message["usage"]["completion_tokens"] > 0
    assert message["usage"]["prompt_tokens"] == context - WIDE["max_tokens"]


def test_only_documents_go_on_after_an_answer(writer: Running, served: Running) -> None:
    for server, plain in ((writer, False), (writer, True), (served, False), (served, True)):
        chat = new(server)
        answer = turn(server, chat, "x", None, plain=plain)["answers"][0]["id"]
        target = {"model": server.model, "settings": WIDE | {"plain": plain}}
        body = {"parent": answer, "targets": [target]}
        reply = server.http.post(f"/api/chats/{chat}/turns", json=body)
        assert reply.status_code == (200 if plain else 400), reply.text
        if plain:
            assert server.idle()
            parts = server.http.get(f"/api/chats/{chat}").json()["messages"][-1]["parts"]
            assert {part["type"] for part in parts} <= {"text"}


def test_clients_may_chat_with_it_all_the_same(writer: Running) -> None:
    reply = writer.chat("The climate")
    assert reply.status_code == 200
    assert reply.json()["choices"][0]["message"]["content"]
