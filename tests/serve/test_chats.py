"""The page's API: turns as jobs that go on without listeners, resuming, branches, search, export, runs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Tiny
from tests.serve.running import Running, events, running, slowly


@pytest.fixture(scope="module")
def own(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tiny.run, tmp_path_factory.mktemp("chats"), runs=tiny.run.parent) as server:
        yield server


def new_chat(server: Running, title: str | None = None) -> str:
    return server.http.post("/api/chats", json={"title": title}).json()["id"]


def ask(
    server: Running,
    chat: str,
    text: str | None = "长城",
    parent: str | None = None,
    n: int = 1,
    **how: Any,
) -> Any:
    target = {"model": server.model, "settings": {"max_tokens": 40} | how}
    body = {"text": text, "parent": parent, "targets": [target] * n}
    reply = server.http.post(f"/api/chats/{chat}/turns", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def followed(server: Running, job: str, after: int = 0) -> list[dict[str, str]]:
    return events(server.http.get(f"/api/jobs/{job}/events", params={"after": after}))


def text_of(found: list[dict[str, str]]) -> str:
    return "".join(json.loads(e["data"])["text"] for e in found if e["event"] == "delta")


def test_resuming_anywhere_loses_and_doubles_nothing(own: Running) -> None:
    (answer,) = ask(own, new_chat(own), seed=3)["answers"]
    live = followed(own, answer["job"])
    assert [int(e["id"]) for e in live] == list(range(1, len(live) + 1)) and len(live) > 1
    assert live[-1]["event"] == "done" and own.idle()
    for after in range(len(live)):
        again = followed(own, answer["job"], after)
        assert [(e["id"], e["event"]) for e in again] == [
            (e["id"], e["event"]) for e in live[after:]
        ]
        assert text_of(again) == text_of(live[after:])
    message = json.loads(live[-1]["data"])["message"]
    assert message == own.http.get(f"/api/chats/{answer['chat']}").json()["messages"][-1]
    said = "".join(part["text"] for part in message["parts"])
    assert said == text_of(live) and message["state"] == "done"
    assert message["usage"]["completion_tokens"] > 0 and message["timing"]["first_token_ms"] >= 0
    headers = {"Last-Event-ID": str(len(live) - 1)}
    assert len(events(own.http.get(f"/api/jobs/{answer['job']}/events", headers=headers))) == 1


def test_killed_sockets_lose_no_word(own: Running) -> None:
    """Readers that leave after every few events see together what one reader sees."""
    (answer,) = ask(own, new_chat(own), seed=9, max_tokens=100)["answers"]
    found: list[tuple[int, str]] = []
    over = False
    while not over:
        after = found[-1][0] if found else 0
        url = f"{own.url}/api/jobs/{answer['job']}/events?after={after}"
        with httpx.stream("GET", url) as stream:
            fields: dict[str, str] = {}
            for line in stream.iter_lines():
                if line:
                    name, _, value = line.partition(": ")
                    fields[name] = value
                    continue
                if fields:
                    over = fields["event"] != "delta"
                    if not over:
                        found.append((int(fields["id"]), json.loads(fields["data"])["text"]))
                    fields = {}
                if over or len(found) % 3 == 2:
                    break  # leaves the socket half read
    assert [number for number, _ in found] == list(range(1, len(found) + 1))
    assert "".join(text for _, text in found) == text_of(followed(own, answer["job"]))


def test_a_job_goes_on_without_a_listener_and_can_be_stopped(
    own: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = new_chat(own)
    ask(own, chat, seed=1)
    assert own.idle()
    assert own.http.get(f"/api/chats/{chat}").json()["messages"][-1]["state"] == "done"
    slowly(monkeypatch, own)  # it would be done before it can be stopped
    (answer,) = ask(own, chat, seed=2, max_tokens=400, logit_bias={"1": -100})["answers"]
    assert own.http.post(f"/api/jobs/{answer['job']}/stop").status_code == 204
    message = own.http.get(f"/api/chats/{chat}").json()["messages"][-1]
    assert message["state"] == "stopped" and own.idle()
    found = followed(own, answer["job"])
    assert "".join(part["text"] for part in message["parts"]) == text_of(found)
    assert own.http.post(f"/api/jobs/{answer['job']}/stop").status_code == 204  # again: nothing


def test_branches_regenerate_edit_and_compare(own: Running) -> None:
    chat = new_chat(own)
    first = ask(own, chat, seed=1)
    user, one = first["user"]["id"], first["answers"][0]["id"]
    again = ask(own, chat, None, parent=user, seed=2)
    assert again["user"] is None and again["answers"][0]["parent"] == user
    edited = ask(own, chat, "明月", parent=None)
    both = ask(own, chat, "春", parent=one, n=2, seed=4)
    assert {a["parent"] for a in both["answers"]} == {both["user"]["id"]}
    assert own.idle()
    found = own.http.get(f"/api/chats/{chat}").json()
    assert found["leaf"] == both["answers"][0]["id"] and found["title"] == "长城"
    roots = [m["id"] for m in found["messages"] if m["parent"] is None]
    assert roots == [user, edited["user"]["id"]]
    changed = own.http.patch(f"/api/chats/{chat}", json={"leaf": one, "title": "t"}).json()
    assert (changed["leaf"], changed["title"]) == (one, "t")
    for bad in ({"leaf": "none"}, {"title": ""}, {"colour": 1}):
        assert own.http.patch(f"/api/chats/{chat}", json=bad).status_code == 400
    for body in (
        {"text": "x", "parent": "none", "targets": [{"model": own.model}]},
        {"text": None, "parent": one, "targets": [{"model": own.model}]},
        {"text": "x", "targets": []},
        {"text": "山" * 600, "targets": [{"model": own.model}]},
        {
            "text": "x",
            "targets": [{"model": own.model}, {"model": own.model, "settings": {"top_p": 7}}],
        },
    ):
        assert own.http.post(f"/api/chats/{chat}/turns", json=body).status_code == 400
    body = {"text": "x", "targets": [{"model": own.model}, {"model": "none"}]}
    assert own.http.post(f"/api/chats/{chat}/turns", json=body).status_code == 404
    assert own.idle()
    assert own.http.get(f"/api/chats/{chat}").json()["messages"] == found["messages"]


def test_export_and_import_keep_the_tree(own: Running) -> None:
    chat = new_chat(own, "a title")
    first = ask(own, chat, "长城 needle", seed=1)
    ask(own, chat, None, parent=first["user"]["id"], seed=2)
    assert own.idle()
    out = own.http.get(f"/api/chats/{chat}/export")
    assert "attachment" in out.headers["content-disposition"]
    back = own.http.post("/api/chats/import", json=out.json()).json()
    old, new = out.json(), own.http.get(f"/api/chats/{back['id']}").json()
    assert new["id"] != old["id"] and new["title"] == "a title"
    assert [m["parts"] for m in new["messages"]] == [m["parts"] for m in old["messages"]]
    place = {m["id"]: n for n, m in enumerate(old["messages"])}
    replace = {m["id"]: n for n, m in enumerate(new["messages"])}
    assert [place.get(m["parent"]) for m in old["messages"]] == [
        replace.get(m["parent"]) for m in new["messages"]
    ]
    assert place[old["leaf"]] == replace[new["leaf"]]
    words = own.http.get(f"/api/chats/{chat}/export", params={"format": "markdown"}).text
    assert "# a title" in words and "长城 needle" in words
    found = own.http.get("/api/chats", params={"search": "needle"}).json()["chats"]
    assert {c["id"] for c in found} == {chat, back["id"]} and "needle" in found[0]["snippet"]
    circle = old | {"messages": [m | {"parent": m["id"]} for m in old["messages"]]}
    for bad in (
        circle,
        {"messages": "x"},
        [],
        old | {"messages": [old["messages"][0] | {"parts": [{"type": "script"}]}]},
    ):
        assert own.http.post("/api/chats/import", json=bad).status_code == 400


LINE = {"text": "月", "tones": "仄", "rhyme": None, "group": None}


@pytest.mark.parametrize(
    "part",
    [
        {}, {"type": "verse"}, {"type": "script"}, {"type": "text"}, {"type": "text", "text": 5},
        {"type": "text", "text": "x", "lines": []}, {"type": "error"}, {"type": ["text"], "text": "x"},
        *({"type": "verse", "form": "五绝", "title": "x", "lines": lines}
          for lines in (5, [], ["x"], [{}], [LINE | {"tones": None}], [LINE | {"stop": None}], [LINE | {"text": 5}])),
    ],
)  # fmt: skip
def test_an_import_lets_in_only_what_the_page_can_draw(own: Running, part: Any) -> None:
    good = [{"type": "text", "text": "x"}, {"type": "reasoning", "text": ""}, {"type": "error", "message": "x"},
            {"type": "verse", "form": "五绝", "title": "x", "lines": [LINE]}]  # fmt: skip
    for parts, status in ((good, 200), ([*good, part], 400)):
        message = {"id": "1", "parent": None, "role": "user", "parts": parts}
        reply = own.http.post("/api/chats/import", json={"messages": [message]})
        assert reply.status_code == status, reply.text
    assert reply.json()["error"]["param"].startswith("messages.0.parts.4")


def test_an_import_has_so_many_messages(own: Running) -> None:
    one = {"role": "user", "parts": [{"type": "text", "text": "x"}]}
    many = [one | {"id": str(n), "parent": str(n - 1) if n else None} for n in range(5001)]
    assert own.http.post("/api/chats/import", json={"messages": many[:5000]}).status_code == 200
    reply = own.http.post("/api/chats/import", json={"messages": many})
    assert reply.status_code == 400 and "5000" in reply.json()["error"]["message"]


def test_a_tab_that_missed_much_hears_all_of_it(own: Running) -> None:
    before = own.hub.store.last_change()
    for number in range(1100):
        own.hub.store.create_chat("local", str(number))
    own.hub.store.db.execute("INSERT INTO change (owner, data) VALUES ('local', 'damaged')")
    last = own.hub.store.create_chat("local", "last")["id"]
    heard = 0
    with httpx.stream("GET", f"{own.url}/api/events?after={before}", timeout=60) as stream:
        for line in stream.iter_lines():
            heard += line.startswith("data: ")
            if last in line:
                break
    assert heard == 1101


def test_a_chat_deleted_as_its_turn_begins_is_a_404(
    own: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, target = own.hub.store, {"model": own.model, "settings": {"max_tokens": 110}}
    body = {"text": "长城", "targets": [target]}
    add, slow = store.add_turn, slowly(monkeypatch, own, 0.1)

    def deleted_before(owner: str, chat: str, *more: Any) -> None:
        store.delete_chat(owner, chat)
        add(owner, chat, *more)

    monkeypatch.setattr(store, "add_turn", deleted_before)
    assert own.http.post(f"/api/chats/{new_chat(own)}/turns", json=body).status_code == 404
    assert own.idle()

    def deleted_after(owner: str, chat: str, *more: Any) -> None:
        add(owner, chat, *more)
        store.delete_chat(owner, chat)

    monkeypatch.setattr(store, "add_turn", deleted_after)
    assert own.http.post(f"/api/chats/{new_chat(own)}/turns", json=body).status_code == 200
    assert own.idle()
    assert len(slow) < 80, "it is written to its end for nobody"


def test_other_tabs_hear_of_changes(own: Running) -> None:
    heard: list[dict] = []
    ready = threading.Event()

    def listen() -> None:
        with httpx.stream("GET", f"{own.url}/api/events", timeout=60) as stream:
            for line in stream.iter_lines():
                ready.set()
                if line.startswith("data: "):
                    heard.append(json.loads(line[6:]))
                    if heard[-1]["kind"] == "deleted":
                        return

    thread = threading.Thread(target=listen)
    thread.start()
    assert ready.wait(60)
    chat = new_chat(own)
    (answer,) = ask(own, chat)["answers"]
    followed(own, answer["job"])
    own.http.delete(f"/api/chats/{chat}")
    thread.join(60)
    assert {change["chat"] for change in heard} == {chat}
    states = [c["message"]["state"] for c in heard if c["kind"] == "message" and c["message"] and c["message"]["role"] == "assistant"]  # fmt: skip
    assert states[-1] == "done" and heard[-1]["kind"] == "deleted"


def test_deleting_a_chat_ends_its_jobs(own: Running) -> None:
    chat = new_chat(own)
    (answer,) = ask(own, chat, max_tokens=120)["answers"]
    assert own.http.delete(f"/api/chats/{chat}").status_code == 204
    assert own.idle()
    assert own.http.get(f"/api/jobs/{answer['job']}/events").status_code == 404
    assert own.http.delete(f"/api/chats/{chat}").status_code == 404


def test_chats_survive_a_restart(tiny: Tiny, tmp_path: Path) -> None:
    with running(tiny.run, tmp_path) as server:
        chat = new_chat(server)
        (answer,) = ask(server, chat, seed=5)["answers"]
        live = followed(server, answer["job"])
        (cut,) = ask(server, chat, seed=6, max_tokens=100)["answers"]
    with running(tiny.run, tmp_path) as server:
        found = server.http.get(f"/api/chats/{chat}").json()["messages"]
        assert text_of(followed(server, answer["job"])) == text_of(live)
        assert followed(server, answer["job"])[-1]["event"] == "done"
        stopped = next(m for m in found if m["id"] == cut["id"])
        assert stopped["state"] in ("stopped", "done")
        assert "".join(p["text"] for p in stopped["parts"]) == text_of(followed(server, cut["job"]))


def test_runs_are_told_as_they_grow(tiny: Tiny, tmp_path: Path, served: Running) -> None:
    root = tmp_path / "runs"
    (root / "one").mkdir(parents=True)
    (root / "other").mkdir()
    manifest = {
        "format": 1,
        "name": "one",
        "stages": {"corpus": {"state": "done"}, "train": {"state": "begun"}},
    }
    (root / "one" / "manifest.json").write_text(json.dumps(manifest))
    log = root / "one" / "events.jsonl"
    lines = [json.dumps({"kind": "train", "step": n, "steps": 8, "loss": n if n != 2 else float("nan")}) + "\n" for n in range(1, 6)]  # fmt: skip
    log.write_text("".join(lines[:4]) + lines[4][:9])
    with running(tiny.run, tmp_path / "data", runs=root) as server:
        (run,) = server.http.get("/api/runs").json()["runs"]
        assert (run["name"], run["state"], run["stage"], run["progress"]) == (
            "one",
            "stopped",
            "train",
            0.5,
        )
        whole = server.http.get(f"/api/runs/{run['id']}").json()
        assert [e["loss"] for e in whole["series"]["train"]] == [1, None, 3, 4]
        assert whole["offset"] == len("".join(lines[:4]))
        got: list[tuple[str, dict]] = []
        with httpx.stream("GET", f"{server.url}/api/runs/{run['id']}/events", timeout=60) as stream:
            number = ""
            for line in stream.iter_lines():
                if line.startswith("id: "):
                    number = line[4:]
                elif line.startswith("data: "):
                    got.append((number, json.loads(line[6:])))
                    if len(got) == 4:
                        with open(log, "a") as file:
                            file.write(lines[4][9:])
                    if len(got) == 5:
                        break
        assert [event["step"] for _, event in got] == [1, 2, 3, 4, 5]
        assert [int(number) for number, _ in got][-1] == log.stat().st_size
        long = json.dumps({"kind": "note", "text": "x" * 1_200_000}) + "\n"
        with open(log, "a") as file:
            file.write(long + lines[0])
        at = log.stat().st_size - len(long) - len(lines[0])
        url = f"{server.url}/api/runs/{run['id']}/events?after={at}"
        with httpx.stream("GET", url, timeout=60) as stream:
            data = (line for line in stream.iter_lines() if line.startswith("data: "))
            assert len(next(data)) > 1_200_000 and json.loads(next(data)[6:])["step"] == 1
        for path in ("/api/runs/none", "/api/runs/..%2f..", "/api/runs/none/events"):
            assert server.http.get(path).status_code == 404
    real = served.http.get("/api/runs").json()["runs"]
    assert [r["state"] for r in real if r["folder"] == "whole"] == ["done"]


def test_what_was_chosen_becomes_the_prompt_as_the_domain_writes_it(own: Running) -> None:
    hints = own.http.get("/api/bootstrap").json()["models"][0]["domain"]
    assert hints["name"] == "verse"
    assert hints["options"][0] == {"name": "form", "choices": ["五绝", "七绝", "五律", "七律"]}
    chat = own.http.post("/api/chats").json()["id"]

    def ask(text: str, options: dict[str, str]) -> Any:
        body = {"text": text, "options": options, "targets": [{"model": own.model}]}
        return own.http.post(f"/api/chats/{chat}/turns", json=body)

    for text, options, prompt in (
        ("长城", {"form": "五绝"}, "五绝 长城"),
        ("七律 长城", {"form": "五绝"}, "七律 长城"),
        ("长城", {"form": "五绝", "rhyme": "阳"}, "五绝 长城 押阳韵"),
        ("长城", {}, "长城"),
    ):
        reply = ask(text, options)
        assert reply.status_code == 200, reply.text
        assert reply.json()["user"]["parts"] == [{"type": "text", "text": prompt}]
    for options, says in (
        ({"form": "六言"}, "form is one of 五绝, 七绝"),
        ({"rhyme": "阴"}, "no rhyme of the 平水韵"),
        ({"metre": "x"}, "has no option metre"),
    ):
        reply = ask("长城", options)
        assert reply.status_code == 400 and says in reply.json()["error"]["message"]
