"""What stands before every route: host, origin, site, key, size and nesting of the body, and the page's security headers.

Open without a key are only the built page's files, which hold nothing of anyone's, and POST /api/login.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shenhong.errors import ServeError
from shenhong.serve.http.faults import Fault, bad, crashed
from shenhong.serve.http.guesses import Guesses
from shenhong.serve.http.limits import body_limit, depth_of
from shenhong.serve.http.proxy import forwarded
from shenhong.serve.settings import Settings

log = logging.getLogger("shenhong")

COOKIE = "shenhong_key"
NO_KEY = "local"  # the owner of everything where no key is set
LOOPBACK = ("localhost", "127.0.0.1", "::1")
AUTHORITY = re.compile(
    r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<name>[\w.-]+))(?::(?P<port>[0-9]{1,5}))?", re.ASCII
)
PORTS = {"http": "80", "https": "443"}  # where an address names none
API = ("/api/", "/v1/", "/tokenize", "/detokenize", "/health", "/metrics", "/openapi.json")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; font-src 'self'; object-src 'none'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Keys:
    """The keys that may ask. Comparison takes the same time for every wrong key."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._owners = {_digest(key): _digest(key)[:16] for key in keys}
        # The cookie is not the key: someone who reads it cannot use the API elsewhere.
        self._cookies = {
            hmac.new(key.encode(), b"shenhong page", "sha256").hexdigest(): _digest(key)[:16]
            for key in keys
        }
        self.guesses = Guesses()

    def __bool__(self) -> bool:
        return bool(self._owners)

    async def owner(self, headers: Headers, address: str) -> str | None:
        """Whose request this is, or None. Fault: 429 after many wrong keys from this address."""
        if not self:
            return NO_KEY
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return await self._look(key.strip(), address)
        cookie = _cookie(headers.get("cookie", ""))
        return _find(self._cookies, cookie) if cookie else None

    async def login(self, key: str, address: str) -> str:
        """The cookie of a key. Fault: 401, or 429 after many wrong ones from this address."""
        owner = await self._look(key, address)
        if owner is None:
            raise Fault(401, "this key is not known here", code="invalid_api_key")
        return next(cookie for cookie, whose in self._cookies.items() if whose == owner)

    async def _look(self, key: str, address: str) -> str | None:
        owner = _find(self._owners, _digest(key))
        await self.guesses.count(owner, address)
        return owner


def _cookie(header: str) -> str | None:
    """Ours, which needs no quotes: Python's own parser takes 7 seconds to take those of 60 KB off."""
    pairs = (pair.strip().partition("=") for pair in header.split(";"))
    return next((value for name, _, value in pairs if name == COOKIE), None)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _find(table: dict[str, str], wanted: str) -> str | None:
    """Look at every entry, found or not."""
    found = None
    for known, owner in table.items():
        if hmac.compare_digest(known.encode(), wanted.encode("utf-8", "surrogateescape")):
            found = owner
    return found


def read_keys(path: Path) -> tuple[str, ...]:
    """One key a line; empty lines and lines with # are not keys. Error: ServeError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ServeError(f"cannot read the key file {path} ({why}); give a text file") from None
    keys = tuple(line.strip() for line in lines if line.strip() and line.strip()[0] != "#")
    if not keys:
        raise ServeError(f"the key file {path} holds no key; write one a line")
    if any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise ServeError(
            f"the key file {path} holds a key with other signs than plain ASCII; choose another key"
        )
    if short := [key for key in keys if len(key) < 16]:
        raise ServeError(
            f"the key file {path} holds a key of {len(short[0])} characters; use at least 16"
        )
    return keys


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Hosts:
    """The names under which this server may be addressed: a page elsewhere whose name points here is refused."""

    def __init__(self, settings: Settings) -> None:
        self.names = {*LOOPBACK, settings.host.lower(), *(h.lower() for h in settings.allow_hosts)}
        self.any_address = not is_loopback(settings.host)
        if self.any_address:
            self.names |= {socket.gethostname().lower(), f"{socket.gethostname().lower()}.local"}

    def allows(self, host: str) -> bool:
        found = authority(host)
        if found is None:
            return False
        name, _ = found
        if name in self.names or is_loopback(name):
            return True
        return self.any_address and _is_address(name)


def authority(written: str) -> tuple[str, str] | None:
    """The name or address and the port ("" where none is written) of NAME[:PORT], and None for anything else."""
    found = AUTHORITY.fullmatch(written)
    if found is None or (found["v6"] and not _is_address(found["v6"])):
        return None
    return (found["v6"] or found["name"]).lower(), found["port"] or ""


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _same_origin(origin: str, scheme: str, host: str) -> bool:
    """Whether `origin`, SCHEME://NAME[:PORT] and no more, is what a page of this server has."""
    its_scheme, _, rest = origin.partition("://")
    one, other = authority(rest), authority(host)
    if one is None or other is None or its_scheme.lower() != scheme:
        return False
    port = PORTS.get(scheme, "")
    return (one[0], one[1] or port) == (other[0], other[1] or port)


class Guard:
    """ASGI middleware; puts the owner into scope["state"]. An error behind it becomes a fault like every other."""

    def __init__(self, app: ASGIApp, settings: Settings, keys: Keys) -> None:
        self.app, self.settings, self.keys = app, settings, keys
        self.hosts = Hosts(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        if self.settings.behind_proxy:
            scope = forwarded(scope)
        started = False

        async def guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._address(scope, headers)
            scope.setdefault("state", {})["owner"] = await self._owner(scope, headers)
            # Cookies go no further: FastAPI would parse them with Python's parser.
            scope["headers"] = [pair for pair in scope["headers"] if pair[0] != b"cookie"]
            if scope["method"] in ("POST", "PUT", "PATCH", "DELETE"):
                receive = _replay(await self._body(scope, headers, receive), receive)
            await self.app(scope, receive, guarded)
        except Fault as fault:
            await fault.response()(scope, receive, guarded)
        except Exception:
            if started:
                raise  # the connection is closed, so the answer is seen to be half
            log.exception("%s %s failed", scope["method"], scope["path"])
            await crashed().response()(scope, receive, guarded)

    def _address(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "")
        if not self.hosts.allows(host):
            raise Fault(
                403, "this server does not answer to that host name (see --allow-host)", code="host"
            )
        origins = headers.getlist("origin")
        if not all(_same_origin(origin, scope["scheme"], host) for origin in origins):
            raise other_site()
        # A browser asks for other sites without an Origin too: no script may read such an answer, but it can be timed.
        # The page's own files may be linked to from anywhere.
        sites = headers.getlist("sec-fetch-site")
        bearer = bool(self.keys) and "authorization" in headers
        if not (_is_shell(scope) or bearer or set(sites) <= {"same-origin", "none"}):
            raise other_site()

    async def _owner(self, scope: Scope, headers: Headers) -> str | None:
        if _is_shell(scope) or scope["path"] == "/api/login":
            return None
        owner = await self.keys.owner(headers, address_of(scope))
        if owner is None:
            raise Fault(
                401,
                "a key is needed: send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
            )
        return owner

    async def _body(self, scope: Scope, headers: Headers, receive: Receive) -> bytes:
        limits = self.settings.limits
        most = body_limit(scope["path"], limits)
        too_large = Fault(413, f"the body is over {most} bytes", code="body_too_large")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > most:
            raise too_large
        chunks, size = [], 0
        loop = asyncio.get_running_loop()
        started = loop.time()
        while True:
            # Every 64 KB that came give time for more, so a body by drops ends too.
            until = started + limits.slow_reader_seconds * (1 + size / 65_536)
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise Fault(408, "the body does not come", code="body_too_slow") from None
            if message["type"] == "http.disconnect":
                raise bad("the connection closed before the body was whole")
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > most:
                raise too_large
            if not message.get("more_body"):
                break
        body = b"".join(chunks)
        if body:
            # A large body is checked in another thread, so that others go on meanwhile.
            if size > 65_536:
                await asyncio.to_thread(_check_json, body, limits.max_json_depth)
            else:
                _check_json(body, limits.max_json_depth)
        return body


def other_site() -> Fault:
    return Fault(
        403,
        "requests from other sites are refused (behind a proxy that speaks TLS: see --behind-proxy)",
        code="origin",
    )


def address_of(scope: Scope) -> str:
    """Where the request comes from."""
    client = scope.get("client")
    return client[0] if client else ""


def _is_shell(scope: Scope) -> bool:
    """Whether a file of the built page is asked for."""
    return scope["method"] in ("GET", "HEAD") and not scope["path"].startswith(API)


def _check_json(body: bytes, most: int) -> None:
    """Fault: 400 where the body is not UTF-8, nests too deep, or is not strict JSON that can be written again."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise bad(
            f"the body is not UTF-8 (byte {error.start + 1})", code="invalid_encoding"
        ) from None
    if depth_of(body) > most:
        raise bad(f"the body nests deeper than {most} levels", code="body_too_deep")
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_number)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise bad(
            "the body holds half a character (\\ud800 to \\udfff alone)", code="invalid_encoding"
        ) from None
    except ValueError as error:
        where = f" (character {error.pos + 1})" if isinstance(error, json.JSONDecodeError) else ""
        raise bad(f"the body is not valid JSON{where}", code="invalid_json") from None


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _number(written: str) -> float:
    number = float(written)
    if math.isinf(number):
        raise ValueError("too large")
    return number


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body once, then what comes after it (the disconnect)."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
