"""Server-sent events that end well: a reader that leaves stops its source at once, an idle stream stays alive."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shenhong.errors import ShenhongError
from shenhong.serve.http.faults import Fault, bad, crashed

log = logging.getLogger("shenhong")

ALIVE_SECONDS = 15.0
DONE = b"data: [DONE]\n\n"


def event(data: Any, kind: str | None = None, number: int | None = None) -> bytes:
    """One event; `data` is written as JSON."""
    head = "" if number is None else f"id: {number}\n"
    head += "" if kind is None else f"event: {kind}\n"
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


class EventStream(Response):
    """`source` yields bytes. It is closed when the reader leaves, even before it began; `closing` is called then too."""

    media_type = "text/event-stream"

    def __init__(
        self, source: AsyncGenerator[bytes, None], closing: Callable[[], None] | None = None
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.source, self.closing, self.sent = source, closing, time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._send_all(receive, send)
        finally:
            await self.source.aclose()  # if it never started, this runs nothing
            if self.closing is not None:
                self.closing()

    async def _send_all(self, receive: Receive, send: Send) -> None:
        pump = asyncio.create_task(self._pump(send))
        others = [asyncio.create_task(gone(receive)), asyncio.create_task(self._stay_alive(send))]
        try:
            await asyncio.wait([pump, *others], return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                await pump
        finally:
            for task in (pump, *others):
                task.cancel()
            await asyncio.gather(pump, *others, return_exceptions=True)
        if pump.done() and not pump.cancelled():
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pump(self, send: Send) -> None:
        async for chunk in self.source:
            self.sent = time.monotonic()
            await send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def _stay_alive(self, send: Send) -> None:
        """A comment where nothing else was sent for a while."""
        while True:
            await asyncio.sleep(ALIVE_SECONDS)
            if time.monotonic() - self.sent >= ALIVE_SECONDS:
                await send(
                    {"type": "http.response.body", "body": b": alive\n\n", "more_body": True}
                )


async def gone(receive: Receive) -> None:
    """Returns when the other side has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Any) -> Any:
    """The result of `work`, which is cancelled when the caller leaves before it is done."""
    task, left = asyncio.ensure_future(work), asyncio.create_task(gone(request.receive))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise bad("the caller left")  # nobody is left to read this
        return task.result()
    finally:
        for one in (task, left):
            one.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def faults_as_events(source: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """After the head of a stream is sent, an error can only be an event."""
    try:
        async for chunk in source:
            yield chunk
    except Fault as fault:
        yield event(fault.body())
    except ShenhongError as error:
        yield event(bad(" ".join(str(error).splitlines())).body())
    except Exception:
        log.exception("a stream failed")
        yield event(crashed().body())
    finally:
        await source.aclose()
