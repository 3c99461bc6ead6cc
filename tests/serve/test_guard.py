"""Who may ask, from where, under which name."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi.routing import APIRoute

from shenhong.errors import ServeError
from shenhong.serve.http import guesses
from shenhong.serve.http.faults import Fault
from shenhong.serve.http.guard import Keys, read_keys
from shenhong.serve.http.guesses import Guesses
from shenhong.serve.http.proxy import forwarded
from shenhong.serve.server import listen
from shenhong.serve.settings import Settings
from tests.conftest import Tiny
from tests.serve.running import Running, running

KEY, OTHER = "k" * 20 + "=/+", "another-key-of-someone"


@pytest.fixture(scope="module")
def locked(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with running(tiny.run, tmp_path_factory.mktemp("locked"), keys=(OTHER, KEY)) as server:
        yield server


def addresses(server: Running) -> list[tuple[str, str]]:
    """Every method and path the application answers to."""
    found = []

    def walk(routes: Any) -> None:
        for route in routes:
            inner = getattr(route, "original_router", None) or getattr(route, "app", None)
            if isinstance(route, APIRoute) or hasattr(route, "methods"):
                path = route.path
                for method in route.methods or ():
                    found.append((method, path.replace("{", "").replace("}", "")))
            elif hasattr(inner, "routes"):
                walk(inner.routes)

    walk(server.app.routes)
    for path, methods in server.app.openapi()["paths"].items():
        plain = path.replace("{", "").replace("}", "")
        found += [(method.upper(), plain) for method in methods]
    found += [("GET", "/api/nowhere"), ("POST", "/nowhere")]  # no route has these
    return sorted(set(found))


def test_every_route_is_behind_the_key(locked: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guesses, "PER_MINUTE", 10**6)
    routes = addresses(locked)
    paths = {path for _, path in routes}
    assert {
        "/v1/chat/completions",
        "/health",
        "/metrics",
        "/openapi.json",
        "/api/chats",
        "/api/runs",
    } <= paths
    with httpx.Client(base_url=locked.url) as stranger:
        for method, path in routes:
            for headers in (
                {},
                {"Authorization": "Bearer " + KEY[:-1]},
                {"Cookie": "shenhong_key=x"},
            ):
                reply = stranger.request(method, path, headers=_bytes(headers), json={})
                if path == "/api/login":
                    assert reply.status_code in (400, 405, 429)
                    continue
                assert reply.status_code == 401, (method, path, reply.status_code)
                if method != "HEAD":
                    assert reply.json()["error"]["code"] == "invalid_api_key"
        assert stranger.get("/").status_code != 401  # the page's files hold nothing of anyone's


def _bytes(headers: dict[str, str]) -> dict[bytes, bytes]:
    return {name.encode(): value.encode() for name, value in headers.items()}


def test_both_keys_open_and_each_has_its_own_chats(locked: Running) -> None:
    with pytest.raises(openai.AuthenticationError):
        locked.openai("wrong" * 5).models.list()
    assert locked.openai(OTHER).models.list().data
    mine = locked.http.post("/api/chats", json={"title": "mine"}).json()["id"]
    with httpx.Client(base_url=locked.url) as page:
        assert page.post("/api/login", json={"key": "wrong" * 5}).status_code == 401
        page.headers["Cookie"] = ""
        reply = page.post("/api/login", json={"key": KEY})
        assert reply.status_code == 204
        cookie = reply.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie and KEY not in cookie
        page.headers["Cookie"] = cookie.split(";")[0]
        assert page.get("/api/bootstrap").json()["auth"] == "key"
        assert page.get("/api/chats").json() == {"chats": []}
        for method, path, body in (
            ("GET", "", None), ("PATCH", "", {"title": "x"}), ("DELETE", "", None), ("GET", "/export", None),
            ("POST", "/turns", {"text": "x", "targets": [{"model": locked.model}]}),
        ):  # fmt: skip
            assert page.request(method, f"/api/chats/{mine}{path}", json=body).status_code == 404
    assert locked.http.get(f"/api/chats/{mine}").json()["title"] == "mine"


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, list[float]()

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def time(locked: Running, monkeypatch: pytest.MonkeyPatch) -> Time:
    """Of the server that is locked, which has seen no key yet."""
    time = Time()
    monkeypatch.setattr(locked.hub.keys, "guesses", Guesses(lambda: time.now, time.sleep))
    return time


@pytest.mark.parametrize("way", ["page", "bearer"])
def test_after_many_wrong_keys_each_waits_and_the_right_one_opens(
    locked: Running, time: Time, way: str
) -> None:
    with httpx.Client(base_url=locked.url) as stranger:

        def tried(key: str) -> int:
            if way == "page":
                return stranger.post("/api/login", json={"key": key}).status_code
            head = {"Authorization": f"Bearer {key}"}
            return stranger.get("/api/chats", headers=head).status_code

        def guessed(number: int) -> tuple[int, float]:
            before = len(time.slept)
            return tried(f"guess {number}"), sum(time.slept[before:])

        assert [guessed(n) for n in range(22)] == [(401, 0)] * 20 + [(401, 3)] * 2
        opened = 204 if way == "page" else 200
        assert tried(OTHER) == opened and time.slept[-1] == 3  # as long as a wrong one
        before = len(time.slept)
        assert guessed(23)[0] == 401 and tried(OTHER) == opened  # and now it is known here
        assert len(time.slept) == before + 1


def test_who_would_wait_long_is_refused_and_other_addresses_go_free() -> None:
    now, slept = [0.0], list[float]()

    async def sleep(seconds: float) -> None:  # everyone at once: no time goes by
        slept.append(seconds)

    keys = Keys([KEY])
    keys.guesses = Guesses(lambda: now[0], sleep)

    def login(key: str, address: str) -> Any:
        with pytest.raises(Fault) as refused:
            asyncio.run(keys.login(key, address))
        return refused.value

    for _ in range(30):
        assert login("guess", "2001:db8::1").status == 401
    assert slept == [3.0 * n for n in range(1, 11)]
    for neighbour in ("2001:db8::1", "2001:db8::ffff"):
        refused = login(KEY, neighbour)
        assert (refused.status, refused.code) == (429, "too_many_logins")
        assert refused.retry_after == pytest.approx(3)
    assert asyncio.run(keys.login(KEY, "2001:db8:0:1::1")) and len(slept) == 10
    now[0] += 60
    assert asyncio.run(keys.login(KEY, "2001:db8::1"))


def test_so_many_addresses_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guesses, "MOST_PLACES", 8)
    counted = Guesses()
    for number in range(50):
        asyncio.run(counted.count("me", f"10.0.0.{number}"))
        asyncio.run(counted.count(None, f"10.0.0.{number}"))
    assert len(counted._left) == len(counted._proven) == 8


def test_behind_a_proxy_its_word_is_taken_and_the_cookie_is_secure(
    tiny: Tiny, tmp_path: Path
) -> None:
    said = {"X-Forwarded-For": "8.8.8.8, 9.9.9.9", "X-Forwarded-Proto": "https"}
    for behind in (False, True):
        with running(tiny.run, tmp_path, keys=(KEY,), behind_proxy=behind) as server:
            origin = server.url.replace("http:", "https:")
            for headers, status in (
                (said | {"Origin": origin}, 204 if behind else 403),
                (said | {"Origin": server.url}, 403 if behind else 204),
                (said, 204),
            ):
                reply = server.http.post("/api/login", json={"key": KEY}, headers=headers)
                assert reply.status_code == status, (behind, headers)
            assert ("secure" in reply.headers["set-cookie"].lower()) is behind
            places = {place for _, place in server.hub.keys.guesses._proven}
            assert places == ({"9.9.9.9"} if behind else {"127.0.0.1"})


def test_only_a_peer_near_by_is_a_proxy() -> None:
    def seen(peer: str, **headers: str) -> Any:
        pairs = [(f"x-forwarded-{k}".encode(), v.encode()) for k, v in headers.items()]
        scope = {"type": "http", "scheme": "http", "client": (peer, 1), "headers": pairs}
        found = forwarded(scope)
        return found["scheme"], found["client"][0]

    given = {"for": "1.1.1.1", "proto": "https"}
    assert seen("8.8.8.8", **given) == ("http", "8.8.8.8")
    assert seen("10.1.2.3", **given) == ("https", "1.1.1.1")
    assert seen("::1", **{"for": "2.2.2.2,1.1.1.1", "proto": "https, http"}) == ("http", "1.1.1.1")
    assert seen("::1") == ("https", "::1")
    assert seen("::1", **{"for": "unknown", "proto": "gopher"}) == ("https", "::1")


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Host": "evil.example"}, 403), ({"Host": "127.0.0.1.evil.example:1"}, 403), ({"Host": "["}, 403),
        ({"Host": "localhost:99"}, 200), ({"Host": "[::1]"}, 200), ({"Host": "192.168.1.5"}, 403),
        ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403), ({"Origin": "HERE"}, 200),
        ({"Origin": "http://[::1"}, 403), ({"Origin": "http://[::1]]:1"}, 403), ({"Origin": ""}, 403),
        ({"Origin": "httpsHERE"}, 403), ({"Origin": "ftp://AT"}, 403), ({"Origin": "//AT"}, 403), ({"Origin": "AT"}, 403),
        ({"Origin": "http://me@AT"}, 403), ({"Origin": "http://AT/"}, 403), ({"Origin": "http://AT#"}, 403),
        ({"Origin": "http://localhost", "Host": "localhost:80"}, 200),
        ({"Host": "[::1"}, 403), ({"Host": "me@localhost"}, 403), ({"Host": "localhost/x"}, 403),
        ({"Host": "localhost:"}, 403), ({"Host": "localhost:x"}, 403), ({"Host": "[localhost]"}, 403),
        ({"Host": "[v1.x]"}, 403), ({"Host": ""}, 403), ({"Host": "::1"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403), ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "anything"}, 403), ({"Sec-Fetch-Site": "same-origin, cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200), ({"Sec-Fetch-Site": "none"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Authorization": "Bearer x"}, 403),
    ],
)  # fmt: skip
def test_host_and_origin(served: Running, headers: dict[str, str], status: int) -> None:
    at = served.url.removeprefix("http://")
    for name, value in headers.items():
        value = value.replace("httpsHERE", f"https://{at}").replace("HERE", served.url)
        headers = headers | {name: value.replace("AT", at)}
    assert served.http.get("/health", headers=headers).status_code == status
    assert served.http.post("/api/chats", headers=headers, json={}).status_code == status


def test_a_link_elsewhere_opens_the_page_and_a_program_with_a_key_asks_from_anywhere(
    served: Running, locked: Running
) -> None:
    elsewhere = {"Sec-Fetch-Site": "cross-site"}
    assert served.http.get("/", headers=elsewhere).status_code == 200
    assert locked.http.get("/api/chats", headers=elsewhere).status_code == 200
    login = locked.http.post("/api/login", json={"key": KEY})
    cookie = {"Cookie": login.headers["set-cookie"].split(";")[0]}
    with httpx.Client(base_url=locked.url, headers=cookie) as page:
        assert page.get("/api/chats").status_code == 200
        assert page.get("/api/chats", headers={"Sec-Fetch-Site": "same-site"}).status_code == 403


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", "/", 200), ("HEAD", "/", 200), ("HEAD", "/health", 200), ("GET", "/%00", 404), ("GET", "/docs", 404),
        ("GET", "/" + "a" * 300, 404), ("GET", "/v1", 404), ("GET", "/api", 404), ("GET", "/v1/models/", 404),
        ("POST", "/v1/embeddings", 404), ("POST", "/", 404), ("DELETE", "/nowhere", 404), ("GET", "/assets/no.js", 404),
        ("GET", "/v1/chat/completions", 405), ("POST", "/health", 405), ("PUT", "/api/chats", 405),
    ],
)  # fmt: skip
def test_addresses_have_their_own_codes(
    served: Running, method: str, path: str, status: int
) -> None:
    reply = served.http.request(method, path)
    assert reply.status_code == status
    if status != 200:
        assert reply.json()["error"]["code"] in ("not_found", "method_not_allowed")
    assert (reply.content == b"") == (method == "HEAD")


def test_a_crash_is_an_answer_like_others(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash() -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(served.hub, "answering", crash)
    counted = served.hub.counts["responses", "500"]
    for _ in range(2):  # the connection stays
        reply = served.http.get("/health")
        assert reply.status_code == 500 and reply.json()["error"]["type"] == "server_error"
        assert "content-security-policy" in reply.headers and "secret" not in reply.text
    assert served.hub.counts["responses", "500"] == counted + 2


def test_every_answer_has_the_page_s_policy(served: Running) -> None:
    for path in ("/", "/health", "/v1/nothing", "/api/chats", "/assets/none.js"):
        policy = served.http.get(path).headers["content-security-policy"]
        assert "default-src 'self'" in policy and "unsafe" not in policy and "http" not in policy
    assert served.http.get("/v1/nothing").json()["error"]["message"]
    for path in (
        "/..%2f..%2fapp.py",
        "/%2e%2e/app.py",
        "//etc/passwd",
        "/assets/..%2f..%2f..%2fapp.py",
    ):
        assert "ASGI" not in served.http.get(path).text


def test_public_addresses_need_a_key_and_busy_ports_are_told(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="no key"):
        listen(Settings(host="0.0.0.0", port=0))
    listen(Settings(host="0.0.0.0", port=0, keys=(KEY,))).close()
    with listen(Settings(port=0)) as taken, pytest.raises(ServeError, match="--port"):
        listen(Settings(port=taken.getsockname()[1]))
    with pytest.raises(ServeError, match="--host"):
        listen(Settings(host="no.such.host.invalid", keys=(KEY,)))
    file = tmp_path / "keys"
    for text, says in (
        ("", "no key"),
        ("# x\n\n", "no key"),
        ("short\n", "at least 16"),
        ("é" * 20, "ASCII"),
    ):
        file.write_text(text)
        with pytest.raises(ServeError, match=says):
            read_keys(file)
    file.write_text(f"# mine\n{KEY}\n\n {OTHER} \n")
    assert read_keys(file) == (KEY, OTHER)
    for path, says in ((tmp_path / "none", "(No such file or directory)"), (tmp_path, "(Is a ")):
        with pytest.raises(ServeError, match=re.escape(says)):
            read_keys(path)
    file.write_bytes(b"\xff" * 20)
    with pytest.raises(ServeError, match="not UTF-8"):
        read_keys(file)


def test_what_one_key_wrote_is_not_to_be_noticed_by_another(locked: Running) -> None:
    """Whether a prompt is found in the cache tells that somebody sent it."""

    def cached(key: str, prompt: str) -> int:
        usage = (
            locked.openai(key)
            .completions.create(model=locked.model, prompt=prompt, max_tokens=1)
            .usage
        )
        assert usage is not None and usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens or 0

    secret = "春花秋月何时了往事知多少小楼昨夜又东风故国不堪回首月明中雕栏玉砌应犹在只是朱颜改"
    assert cached(KEY, secret) == 0
    assert cached(KEY, secret) >= 16
    assert cached(OTHER, secret) == 0
    assert cached(OTHER, secret) >= 16
