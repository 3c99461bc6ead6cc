"""Streams that want a server to stand still, for serve_load.py: what an attack on it has tried, each again and again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable

JSON = "Content-Type: application/json"


async def ask(port: int, head: str, body: bytes = b"", read: int = 1 << 16) -> bytes:
    """One request on a connection of its own; the first bytes of what comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        lines = f"{head} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{JSON}\r\n"
        writer.write(f"{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        with contextlib.suppress(ConnectionError):  # a body that is too long is not read to its end
            await writer.drain()
        return await reader.read(read)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def chat(model: str, content: object) -> bytes:
    messages = [{"role": "user", "content": content}]
    return json.dumps({"model": model, "messages": messages, "max_tokens": 1}).encode()


async def a_large_chat(port: int) -> str:
    """The id of an imported chat of some 8 MB."""
    text = [{"type": "text", "text": "白日依山尽 " * 3000}]
    messages = [
        {"id": f"m{i}", "parent": f"m{i - 1}" if i else None, "role": "user", "parts": text}
        for i in range(150)
    ]
    await ask(port, "POST /api/chats/import", json.dumps({"messages": messages}).encode())
    listed = await ask(port, "GET /api/chats")
    return json.loads(listed.partition(b"\r\n\r\n")[2])["chats"][0]["id"]


async def attack(port: int, model: str, until: float) -> Counter[str]:
    """All of them at once until then; how often each was tried."""
    large = await a_large_chat(port)
    blanks = chat(model, " " * 60_000 + "x")
    marks = chat(model, "\u0301\u0316" * 20_000)
    fields = json.dumps({f"f{i}": 0 for i in range(60_000)}).encode()
    lists = chat(model, [[] for _ in range(300_000)])
    numbers = {"type": "number", "multipleOf": int("9" * 21)}
    schema = json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": "x"}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"allOf": [numbers] * 8000}},
            },
        }
    ).encode()
    tried: Counter[str] = Counter()

    async def slow_reader() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET /api/chats/{large} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        await asyncio.sleep(min(5, max(0.0, until - time.monotonic())))
        await reader.read(100)
        writer.close()

    kinds: dict[str, Callable[[], Awaitable[object]]] = {
        "blanks": lambda: ask(port, "POST /v1/chat/completions", blanks),
        "marks": lambda: ask(port, "POST /v1/chat/completions", marks),
        "unknown fields": lambda: ask(port, "POST /api/login", fields),
        "lists": lambda: ask(port, "POST /v1/chat/completions", lists),
        "schemas": lambda: ask(port, "POST /v1/chat/completions", schema),
        "searches": lambda: ask(port, "GET /api/chats?search=%E7%99%BD%25_x"),
        **{f"slow readers {i}": slow_reader for i in range(8)},
    }

    async def again(name: str, one: Callable[[], Awaitable[object]]) -> None:
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                await one()
            tried[name.rstrip(" 0123456789")] += 1
            await asyncio.sleep(0.05)

    await asyncio.gather(*(again(name, one) for name, one in kinds.items()))
    return tried
