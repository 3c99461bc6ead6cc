"""A real server on a real socket, in a thread of the test's process so that its inside can be looked at."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from shenhong.engine import engine as engine_module
from shenhong.serve import Limits, Settings
from shenhong.serve.hub import Hub
from shenhong.serve.server import Server, config_of, listen

# Tests ask fast and often.
FREE = Limits(requests_per_minute=10**6, tokens_per_minute=10**9)


@dataclass
class Running:
    """`http` speaks to the server; `hub` is its inside."""

    url: str
    hub: Hub
    server: Server
    http: httpx.Client

    def openai(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def chat(self, prompt: str = "长城", **more: Any) -> httpx.Response:
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}]}
        return self.http.post("/v1/chat/completions", json=body | {"max_tokens": 8} | more)

    @property
    def app(self) -> Any:
        return self.server.config.app

    @property
    def model(self) -> str:
        return next(iter(self.hub.models))

    def idle(self, seconds: float = 60) -> bool:
        """Whether everything that was asked for is over, in the end: nothing runs, nothing waits, no page is held."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            engines = [model.llm.engine for model in self.hub.models.values()]
            jobs = self.app.state.jobs.running
            if not (jobs or self.hub.answering() or any(engine.busy for engine in engines)):
                stats = [engine.stats() for engine in engines]
                return all(s.running == s.waiting == 0 and s.pages_free == s.pages for s in stats)
            time.sleep(0.02)
        return False


@contextlib.contextmanager
def running(models: Path | list[Path], data: Path, **settings: Any) -> Iterator[Running]:
    paths = models if isinstance(models, list) else [models]
    chosen = replace(Settings(port=0, data=data, limits=FREE, drain_seconds=1), **settings)
    with listen(chosen) as bound:
        hub = Hub(chosen, paths)
        server = Server(config_of(hub, "critical"), hub)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        key = {"Authorization": f"Bearer {chosen.keys[0]}"} if chosen.keys else {}
        try:
            with httpx.Client(base_url=url, timeout=60, headers=key) as http:
                yield Running(url, hub, server, http)
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive(), "the server did not end"


def with_template(model: Path, folder: Path, template: str) -> Path:
    """A copy of a model folder with another chat template."""
    copy = Path(shutil.copytree(model, folder))
    (copy / "chat_template.jinja").write_text(template, encoding="utf-8")
    return copy


def begin_with(patch: pytest.MonkeyPatch, server: Running, text: str) -> None:
    """The model writes this first, then what it likes."""
    llm = server.hub.models[server.model].llm
    first = llm.tokenizer.encode(text)
    honest = engine_module.sample

    def sample(logits: Any, samplings: Any) -> Any:
        drawn = honest(logits, samplings)
        written = [running.written for running in llm.engine.running.values()]
        assert len(written) == len(drawn) == 1
        return [first[written[0]]] if written[0] < len(first) else drawn

    patch.setattr(engine_module, "sample", sample)
    patch.setattr(llm.engine, "_plain", lambda parts: False)  # every token is drawn there


def slowly(patch: pytest.MonkeyPatch, server: Running, seconds: float = 0.01) -> list[float]:
    """The model writes a token a step and waits so long before each; when each began."""
    engine = server.hub.models[server.model].llm.engine
    begun: list[float] = []
    step = engine.step

    def waiting() -> Any:
        begun.append(time.monotonic())
        time.sleep(seconds)
        return step()

    patch.setattr(engine, "step", waiting)
    patch.setattr(engine, "_plain", lambda parts: False)
    return begun


def in_step(patch: pytest.MonkeyPatch, server: Running) -> None:
    """The model writes a token a step, and none before its reader took the one before: nothing comes in one with another."""
    thread = server.hub.models[server.model].thread
    step = thread.engine.step

    async def taken() -> None:
        # What a step wrote was put into its stream before this was asked for.
        while any(stream._events for stream in thread.live):
            await asyncio.sleep(0.001)

    def after_the_reader() -> Any:
        asyncio.run_coroutine_threadsafe(taken(), thread._loop).result(60)
        return step()

    patch.setattr(thread.engine, "step", after_the_reader)
    patch.setattr(thread.engine, "_plain", lambda parts: False)


def events(response: httpx.Response) -> list[dict[str, str]]:
    """The fields of each server-sent event of a stream that is over."""
    found = []
    for block in response.read().decode().split("\n\n"):
        fields = [line.split(": ", 1) for line in block.splitlines() if ": " in line[1:]]
        if fields:
            found.append({name: value for name, value in fields})
    return found
