"""From `shenhong serve` to a socket that answers, and an orderly end.

SIGTERM or Ctrl-C once: no new answers (503), running ones may finish within `drain_seconds`, what is left then ends
with a 503. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn

from shenhong.errors import ServeError
from shenhong.serve.app import create_app
from shenhong.serve.http.connection import timeout_protocol
from shenhong.serve.http.faults import stopping
from shenhong.serve.http.guard import is_loopback
from shenhong.serve.hub import Hub, Served
from shenhong.serve.settings import Settings

DRAFT_TOKENS, DEEPEST_DRAFT = 32, 3  # of the measurement at the start
SEND_BYTES = 262_144
LAST_WORDS_SECONDS = 3.0  # for errors to reach their readers after the drain


def listen(settings: Settings) -> socket.socket:
    """A bound socket. Errors: ServeError for a port in use, an unknown host, or a public one without a key."""
    host, port = settings.host, settings.port
    if not settings.keys and not is_loopback(host):
        raise ServeError(
            f"{host} can be reached from other machines, and there is no key; give --api-key-file, or use 127.0.0.1"
        )
    if not 0 <= port <= 65535:
        raise ServeError(f"port {port} does not exist; give one from 0 to 65535")
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, number)
    except OSError as error:
        raise ServeError(
            f"--host {host} is no address of this machine ({error.strerror})"
        ) from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Of every connection: a reader's progress is seen by what the kernel takes, and it may take megabytes ahead.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        bound.bind(address)
        bound.listen(1024)
    except OSError as error:
        bound.close()
        raise ServeError(
            f"cannot listen on {host} port {port} ({error.strerror}); choose another with --port (0 takes a free one)"
        ) from None
    return bound


def address_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, with a drain before the end."""

    def __init__(self, config: uvicorn.Config, hub: Hub) -> None:
        super().__init__(config)
        self.hub = hub
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called as a signal handler: only hands over to the event loop, or ends the process."""
        if self._loop is None or self.hub.draining:
            os._exit(130)  # without a word from whatever is under way
        self.hub.draining = True
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._drain = asyncio.create_task(self._finish())

    async def _finish(self) -> None:
        """Wait for the answers, then end those that are left with an error, and stop."""
        hub, loop = self.hub, asyncio.get_running_loop()
        waiting, seconds = hub.answering(), hub.settings.drain_seconds
        answers = "1 answer" if waiting == 1 else f"{waiting} answers"
        what = f"{answers} may finish within {seconds:g} s" if waiting else "no answer is under way"
        print(f"stopping: {what}", file=sys.stderr, flush=True)
        until = loop.time() + hub.settings.drain_seconds
        while hub.answering() and loop.time() < until and not self.should_exit:
            await asyncio.sleep(0.02)
        for model in hub.models.values():
            model.thread.fail(stopping())
        hub.stopped.set()
        self.should_exit = True


def _set_draft(model: Served, depth: int | None) -> None:
    """How far the model's own multi-token-prediction layer guesses ahead, if it has one."""
    engine = model.llm.engine
    if engine.drafter is None:
        return
    if depth is not None:
        engine.drafter.depth = depth
        return
    tokenizer = model.llm.tokenizer
    prompt = tokenizer.encode_prompt("") if model.chat else tokenizer.begin
    engine.calibrate(prompt, min(DRAFT_TOKENS, model.context - len(prompt)), DEEPEST_DRAFT)


def config_of(hub: Hub, log_level: str = "warning") -> uvicorn.Config:
    """How uvicorn runs the application."""
    return uvicorn.Config(
        create_app(hub),
        http=timeout_protocol(hub.limits.slow_head_seconds, hub.limits.slow_reader_seconds),
        log_level=log_level,
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=int(LAST_WORDS_SECONDS),
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=65_536,
        proxy_headers=False,
    )


def serve(
    models: list[Path],
    settings: Settings,
    say: Callable[[str], None] = print,
) -> None:
    """Load the models and answer until told to stop. Errors: ServeError, ModelError."""
    logging.basicConfig(level=logging.WARNING, format="shenhong: %(message)s")
    with listen(settings) as bound:
        hub = Hub(settings, models)
        for model in hub.models.values():
            _set_draft(model, settings.draft)
        server = Server(config_of(hub), hub)
        say(f"{', '.join(hub.models)} at {address_of(bound)}  (Ctrl-C stops)")
        for model in hub.models.values():
            say(f"{model.id}: {model.llm.serving}")
        sys.stdout.flush()
        server.run(sockets=[bound])
        if server.started:
            print("stopped", file=sys.stderr, flush=True)
    if not server.started:
        raise ServeError("the server could not start; the lines above say why")
