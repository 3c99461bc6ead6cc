"""What a running server holds: its models with their engine threads, the store, the budgets, and whether it is stopping."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from fastapi import Request

from shenhong import domains
from shenhong.chat.template import Template
from shenhong.domains.base import Domain
from shenhong.engine import EngineSettings, Sampling
from shenhong.llm import LLM
from shenhong.models import SERVED, facts, folder_of, is_gguf, run_of
from shenhong.serve.engine_thread import EngineThread
from shenhong.serve.http.at_once import AtOnce
from shenhong.serve.http.faults import Fault
from shenhong.serve.http.guard import Keys
from shenhong.serve.http.limits import Meter
from shenhong.serve.page.search import search
from shenhong.serve.page.store import Store
from shenhong.serve.sampling import defaults_of
from shenhong.serve.settings import Settings, default_data

P = ParamSpec("P")
R = TypeVar("R")

SEARCHES = 4  # of one owner at once
CACHE_SHARE = 0.25  # of the memory, for the caches of all models together


@dataclass
class Served:
    """One model. `thread` is there while the server runs."""

    id: str
    llm: LLM
    template: Template
    facts: dict[str, Any]
    domain: Domain
    bytes_of: list[bytes]  # what each token id writes
    sampling: Sampling  # where a caller says nothing
    created: int
    thread: EngineThread = field(init=False)

    @property
    def chat(self) -> bool:
        """Whether it learnt to answer; a model that did not goes on with the text it is given."""
        return self.llm.tokenizer.special.template is not None

    @property
    def context(self) -> int:
        return self.llm.engine.config.max_position_embeddings


def open_models(paths: list[Path], settings: Settings) -> dict[str, Served]:
    """Load all, by id: a run's, a folder's or a file's name, numbered where two are the same. Errors: ModelError, ServeError."""
    found: dict[str, Served] = {}
    try:
        for path in paths:
            folder = folder_of(path)
            run = run_of(folder)
            plain = run.stem if is_gguf(run) else run.resolve().name
            name, number = plain, 1
            while name in found:
                number += 1
                name = f"{plain}-{number}"
            llm = LLM(path, settings.dtype, EngineSettings(cache_share=CACHE_SHARE / len(paths)))
            template = Template(folder, llm.tokenizer, settings.limits.template_seconds)
            bytes_of = llm.engine.bytes_of or []
            for token, mark in template.marks.items():  # shown, so that calls can be read
                bytes_of[token] = mark.encode()
            found[name] = Served(
                id=name,
                llm=llm,
                template=template,
                facts=facts(path) | _here(llm),
                domain=domains.of_run(run),
                bytes_of=bytes_of,
                sampling=defaults_of(folder),
                created=int(
                    (folder if is_gguf(folder) else folder / "config.json").stat().st_mtime
                ),
            )
    except BaseException:
        for served in found.values():
            served.template.close()
        raise
    return found


def _here(llm: LLM) -> dict[str, str]:
    """What became of a model when it was opened."""
    engine = llm.engine
    tokens = engine.pages.count * engine.settings.page
    size = tokens * engine.pools.bytes_per_token
    return {SERVED: str(llm.serving), "cache": f"{tokens:,} tokens, {size / 1e6:,.0f} MB when full"}


class Hub:
    """Made before the event loop; `start` and `stop` run inside of it. Errors: ServeError, ModelError."""

    def __init__(self, settings: Settings, paths: list[Path]) -> None:
        self.settings, self.limits = settings, settings.limits
        self.keys, self.meter = Keys(settings.keys), Meter(settings.limits, bool(settings.keys))
        self.counts: Counter[tuple[str, ...]] = Counter()  # for /metrics
        self.started = time.time()
        self.draining = False
        self.reading = AtOnce(settings.limits.max_reading_bytes, "chats being read")
        self.streams = AtOnce(settings.limits.max_streams, "event streams")
        self.searches = AtOnce(SEARCHES, "searches")
        self.store = Store((settings.data or default_data()) / "chats.db", settings.limits)
        try:
            self.models = open_models(paths, settings)
        except BaseException:
            self.store.close()
            raise
        self._files = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._searching = ThreadPoolExecutor(4 * SEARCHES, thread_name_prefix="search")

    async def start(self) -> None:
        self.stopped = asyncio.Event()  # streams that never end listen to it
        for model in self.models.values():
            model.thread = EngineThread(model.llm.engine, model.id, self.limits.max_queue)
        await self.stored(self.store.recover)

    async def stop(self) -> None:
        self.draining = True
        self.stopped.set()
        for model in self.models.values():
            model.thread.stop()
        await asyncio.gather(*(model.thread.join() for model in self.models.values()))
        await asyncio.to_thread(self._searching.shutdown)
        await asyncio.to_thread(self._files.shutdown)
        self.store.close()
        for model in self.models.values():
            model.template.close()

    async def stored(self, function: Callable[P, R], *args: P.args, **more: P.kwargs) -> R:
        """Call the store in its own thread, so that a slow disk holds up nothing else."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._files, lambda: function(*args, **more))

    async def searched(self, owner: str, *args: Any) -> list[dict[str, Any]]:
        """`search` of this owner's chats, which holds up nothing else. Fault: 429."""
        loop = asyncio.get_running_loop()
        with self.searches.place(owner):
            find = partial(search, self.store.path, owner, *args)
            return await loop.run_in_executor(self._searching, find)

    def model(self, name: str | None) -> Served:
        """Fault: 404 for a model that is not served here."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            known = ", ".join(self.models)
            raise Fault(
                404,
                f"model {name[:100]!r} is not served here; there is {known}",
                param="model",
                code="model_not_found",
            )
        return self.models[name]

    def answering(self) -> int:
        """How many answers are running or waiting."""
        return sum(len(model.thread.live) for model in self.models.values())


def hub_of(request: Request) -> Hub:
    return request.app.state.hub


def owner_of(request: Request) -> str:
    """Whose request it is, as the guard found out."""
    return request.state.owner
