"""Connections that keep the server waiting are closed: the head of a request must come whole within a set time.

uvicorn bounds how long a connection may be idle between requests, and `guard` how long a body may take; without this,
who sends one byte of a header now and then (slowloris) would hold a connection for ever.
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class Prompt(H11Protocol):
    """One connection. `head_seconds`: from its first byte, or from the connection's begin for the first request."""

    head_seconds: float
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Starts the time of a head that has begun to come, and ends that of one that is whole.

        What is left of a body when its answer is already sent has only as long.
        """
        if self.conn.their_state is h11.IDLE:
            waiting = self.cycle is None or bool(self.conn.trailing_data[0])
        else:
            left = self.conn.their_state is h11.SEND_BODY
            waiting = left and self.cycle.response_complete
        if not waiting:
            self._forget()
        elif self._late is None:
            self._late = self.loop.call_later(self.head_seconds, self.transport.close)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def within(seconds: float) -> type[Prompt]:
    """The protocol whose heads may take that long."""
    return type("Prompt", (Prompt,), {"head_seconds": seconds})
