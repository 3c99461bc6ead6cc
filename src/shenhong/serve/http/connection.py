"""Time limits on connections: the head of a request must arrive whole within a set time, and what is sent must be read.

uvicorn bounds how long a connection may be idle between requests, and `guard` how long a body may take; without this,
a client that sends one byte of a header now and then (slowloris), or never reads its answer, would hold a connection for ever.
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

PROGRESS = 65_536  # bytes; a reader that takes fewer counts as stuck


class TimeoutProtocol(H11Protocol):
    """One connection. `head_seconds`: from its first byte, or, for the first request, from the start of the connection.

    `reader_seconds`: how long the other side may take nothing of what waits for it.
    """

    head_seconds: float
    reader_seconds: float
    _late: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # writing is paused while anything waits here
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        self._taken()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        self._taken()
        super().resume_writing()

    def _wait_for_reader(self) -> None:
        waits = self.transport.get_write_buffer_size()
        self._stuck = self.loop.call_later(self.reader_seconds, self._check_progress, waits)

    def _check_progress(self, waited: int) -> None:
        """Closing would wait for the reader again, so the connection is cut."""
        if self.transport.get_write_buffer_size() > waited - PROGRESS:
            self.transport.abort()
        else:
            self._wait_for_reader()

    def _taken(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def _watch(self) -> None:
        """Starts the time of a head that has started to come, and ends that of one that is whole.

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


def timeout_protocol(head_seconds: float, reader_seconds: float) -> type[TimeoutProtocol]:
    """The protocol with these time limits."""
    return type(
        "TimeoutProtocol",
        (TimeoutProtocol,),
        {"head_seconds": head_seconds, "reader_seconds": reader_seconds},
    )
