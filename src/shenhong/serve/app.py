"""The application: all routes behind the guard, and the built page."""

from __future__ import annotations

import contextlib
import mimetypes
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shenhong import __version__
from shenhong.serve.http import ops
from shenhong.serve.http.faults import HANDLERS, Fault
from shenhong.serve.http.guard import Guard
from shenhong.serve.hub import Hub
from shenhong.serve.openai import chat, completions, models, responses
from shenhong.serve.page import chats, runs
from shenhong.serve.page.jobs import Jobs

UI = Path(__file__).parent / "ui"
mimetypes.add_type("application/manifest+json", ".webmanifest")
mimetypes.add_type("text/javascript", ".js")


class Counted:
    """ASGI middleware that counts responses by status."""

    def __init__(self, app: ASGIApp, hub: Hub) -> None:
        self.app, self.hub = app, hub

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.hub.counts["responses", str(message["status"])] += 1
            await send(message)

        await self.app(scope, receive, counting)


def create_app(hub: Hub) -> FastAPI:
    """Routes are made once; the hub starts and stops with the application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await hub.start()
        yield
        await app.state.jobs.finish()
        await hub.stop()

    # The pages that draw the description load scripts from elsewhere, so only the description itself is served.
    app = FastAPI(
        title="Shenhong",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        exception_handlers=HANDLERS,
        redirect_slashes=False,
    )
    app.state.hub = hub
    app.state.jobs = Jobs(hub)
    for part in (chat, completions, models, responses, ops, chats, runs):
        app.include_router(part.router)
    app.router.default = page
    app.add_middleware(Guard, settings=hub.settings, keys=hub.keys)
    app.add_middleware(Counted, hub=hub)
    return app


async def page(scope: Scope, receive: Receive, send: Send) -> None:
    """A file of the built page, at every address that no route has. Fault: 404."""
    path = scope["path"].removeprefix("/")
    root = UI.resolve()
    file, reads = None, scope["method"] in ("GET", "HEAD")
    if reads:
        with contextlib.suppress(OSError, ValueError):  # a name no file can have
            found = (root / (path or "index.html")).resolve()
            file = found if found.is_relative_to(root) and found.is_file() else None
    if file is None and reads and not path:
        raise Fault(404, "the page is not built here; the API is at /v1", code="no_page")
    if file is None:
        raise Fault(404, f"there is no /{path[:100]}", code="not_found")
    # Names of assets hold a hash of their content; the rest is asked for anew.
    lasting = path.startswith("assets/")
    caching = "public, max-age=31536000, immutable" if lasting else "no-cache"
    await FileResponse(file, headers={"Cache-Control": caching})(scope, receive, send)
