"""The application: all routes behind the guard, and the built page."""

from __future__ import annotations

import mimetypes
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shenhong import __version__
from shenhong.serve import chats, openai_api, ops, responses, runs
from shenhong.serve.faults import HANDLERS, Fault
from shenhong.serve.guard import API, Guard
from shenhong.serve.hub import Hub
from shenhong.serve.jobs import Jobs

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
    )
    app.state.hub = hub
    app.state.jobs = Jobs(hub)
    for part in (openai_api, responses, ops, chats, runs):
        app.include_router(part.router)
    app.add_api_route("/{path:path}", page, methods=["GET"], include_in_schema=False)
    app.add_middleware(Guard, settings=hub.settings, keys=hub.keys)
    app.add_middleware(Counted, hub=hub)
    return app


async def page(request: Request, path: str) -> Response:
    """A file of the built page; any other address is one of the page's own, so it gives index.html."""
    if f"/{path}".startswith(API):
        raise Fault(404, f"there is no /{path[:100]}", code="not_found")
    root = UI.resolve()
    file = (root / path).resolve()
    if not path or not file.is_relative_to(root) or not file.is_file():
        if path.startswith("assets/"):
            raise Fault(404, f"there is no /{path[:100]}", code="not_found")
        file = root / "index.html"
    if not file.is_file():
        raise Fault(404, "the page is not built here; the API is at /v1", code="no_page")
    # Names of assets hold a hash of their content; the rest is asked for anew.
    lasting = path.startswith("assets/") and file.name != "index.html"
    caching = "public, max-age=31536000, immutable" if lasting else "no-cache"
    return FileResponse(file, headers={"Cache-Control": caching})
