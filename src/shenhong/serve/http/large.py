"""A large answer, handed on a piece at a time as its reader takes it: what waits to be sent is kept once."""

from __future__ import annotations

from collections.abc import Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

PIECE = 65_536


class LargeResponse(Response):
    """`closing` is called when it is sent, or its reader has left."""

    closing: Callable[[], None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code}
        try:
            await send({**start, "headers": self.raw_headers})
            for at in range(0, len(self.body), PIECE):
                piece = bytes(self.body[at : at + PIECE])
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if self.closing is not None:
                self.closing()
