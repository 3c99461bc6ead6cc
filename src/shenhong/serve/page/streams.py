"""The page's event streams: how many one key may have open, and where one goes on that was cut off."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from fastapi import Request, Response

from shenhong.serve.http import sse
from shenhong.serve.hub import hub_of, owner_of


def event_stream(request: Request, source: AsyncGenerator[bytes, None]) -> Response:
    """Fault: 429 where this owner has many open."""
    with contextlib.ExitStack() as held:
        held.enter_context(hub_of(request).streams.place(owner_of(request)))
        return sse.EventStream(source, held.pop_all().close)


def resumed_after(request: Request, after: int | None) -> int | None:
    """Last-Event-ID is newer than the address a browser reconnects with."""
    last = request.headers.get("last-event-id", "")
    return int(last) if last.isascii() and last.isdigit() and len(last) < 19 else after
