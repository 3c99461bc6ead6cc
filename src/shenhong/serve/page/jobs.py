"""The page's answers are jobs of the server: they go on whether or not anyone listens, and anyone may listen again.

Events are numbered from 1. They are written to the store, then sent to listeners, so a listener that comes back with
the last number it saw gets exactly what it missed, even from another process after a restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from shenhong.serve.answer import Texts, deltas, usage_json
from shenhong.serve.engine_thread import Stream
from shenhong.serve.generation import GenerationRequest
from shenhong.serve.http import sse
from shenhong.serve.http.faults import Fault
from shenhong.serve.hub import Hub, Served
from shenhong.serve.page.store import text_of

log = logging.getLogger("shenhong")


class Bell:
    """Wakes everyone who waits for news."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    def next(self) -> asyncio.Event:
        """Set by the next ring. Take it before looking for news, so that none is missed between."""
        return self._event


@dataclass
class Job:
    """One answer being written. `events`: (number, kind, data as JSON) of all so far."""

    id: str
    owner: str
    model: Served
    message: dict[str, Any]
    stream: Stream
    generation: GenerationRequest
    prompt: str | None  # the words it answers; None: it goes on with a document
    started: float  # when the turn was asked for, on the monotonic clock
    events: list[tuple[int, str, str]] = field(default_factory=list)
    bell: Bell = field(default_factory=Bell)
    stopped: bool = False
    task: asyncio.Task[None] | None = None


class Jobs:
    """All jobs that run, and the bell of each owner for changes of chats."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.running: dict[str, Job] = {}
        self._changed: dict[str, Bell] = {}

    def changed(self, owner: str) -> Bell:
        return self._changed.setdefault(owner, Bell())

    def start(self, job: Job) -> None:
        self.running[job.id] = job
        job.task = asyncio.create_task(self._write(job))

    def stop(self, job: Job) -> None:
        """End it where it is; what is written stays."""
        job.stopped = True
        job.stream.abort(Fault(409, "stopped"))

    async def stop_chat(self, chat: str) -> None:
        """Before a chat is deleted."""
        jobs = [job for job in self.running.values() if job.message["chat"] == chat]
        for job in jobs:
            self.stop(job)
        await asyncio.gather(*(job.task for job in jobs if job.task), return_exceptions=True)

    async def finish(self) -> None:
        """When the server ends: every job is stopped and written down."""
        for job in list(self.running.values()):
            self.stop(job)
        tasks = [job.task for job in self.running.values() if job.task]
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---------------------------------------------------------------- writing

    async def _write(self, job: Job) -> None:
        first, before = None, 0
        state, error, usage, thought = "done", None, None, 0
        try:
            async with aclosing(deltas(job.model, job.stream, job.generation)) as source:
                async for delta in source:
                    if delta.texts and first is None:
                        # A delta may hold many tokens, and those of the first one took no time since.
                        first, before = time.monotonic(), job.stream.written
                    await self._emit(job, delta.texts)
                    usage = delta.usage or usage
                    thought += delta.thought
        except Fault as fault:
            state, error = ("stopped" if job.stopped else "error"), fault.message
        except Exception:
            log.exception("a job failed")
            state, error = "error", "the server failed on this answer; its log says why"
        finally:
            job.stream.close()
        texts = _texts(job.events)  # the message is exactly what was sent to listeners
        parts: list[dict[str, Any]] = [
            {"type": part, "text": text} for part, text in texts.items() if text
        ]
        domain, prompt = job.model.domain, job.prompt
        if state == "done" and prompt is not None and (part := domain.part(texts["text"], prompt)):
            parts = [other for other in parts if other["type"] != "text"] + [part]
        if state == "error":
            parts.append({"type": "error", "message": error})
        message = job.message | {
            "parts": parts,
            "state": state,
            "usage": usage and usage_json([usage], thought=thought),
        }
        if first is not None:
            seconds = max(time.monotonic() - first, 1e-6)
            message["timing"] = {
                "first_token_ms": round(1000 * (first - job.started), 1),
                "tokens_per_second": round((job.stream.written - before) / seconds, 1),
            }
        await self._end(job, message)

    async def _emit(self, job: Job, texts: Texts) -> None:
        if not texts:
            return
        number = len(job.events)
        new = [
            (number + n, "delta", json.dumps({"part": part, "text": text}, ensure_ascii=False))
            for n, (part, text) in enumerate(texts, 1)
        ]
        if await self.hub.stored(self.hub.store.add_job_events, job.id, new):
            job.events += new
        else:
            self.stop(job)  # its chat was deleted as it began
        job.bell.ring()

    async def _end(self, job: Job, message: dict[str, Any]) -> None:
        number = len(job.events) + 1
        try:
            await self.hub.stored(self.hub.store.end_job, job.owner, job.id, number, message)
        except Exception:
            log.exception("the end of a job could not be stored")
        failed = message["state"] == "error"
        data = {"message": message["parts"][-1]["message"]} if failed else {"message": message}
        kind = "failed" if failed else "done"
        job.events.append((number, kind, json.dumps(data, ensure_ascii=False)))
        del self.running[job.id]
        job.bell.ring()
        self.changed(job.owner).ring()

    # ---------------------------------------------------------------- listening

    async def listen(self, owner: str, job: str, after: int) -> AsyncGenerator[bytes, None]:
        """Server-sent events from number after + 1 to the end of the job."""
        running = self.running.get(job)
        if running is not None:
            while True:
                news = running.bell.next()
                for number, kind, data in running.events[after:]:
                    yield _sse(number, kind, data)
                    after = number
                    if kind != "delta":
                        return
                await news.wait()
        for number, kind, data in await self.hub.stored(self.hub.store.job_events, job, after):
            yield _sse(number, kind, await self._whole(owner, job, kind, data))
            after = number

    async def _whole(self, owner: str, job: str, kind: str, data: str) -> str:
        if kind != "done":
            return data
        row = await self.hub.stored(self.hub.store.job, owner, job)
        message = row and await self.hub.stored(self.hub.store.message, row["message"])
        return json.dumps({"message": message}, ensure_ascii=False)

    async def feed(self, owner: str, after: int | None) -> AsyncGenerator[bytes, None]:
        """Changes of this owner's chats; without `after`, those from now on."""
        store, hub = self.hub.store, self.hub
        if after is None:
            after = await hub.stored(store.last_change)
        yield f"id: {after}\n\n".encode()
        end = asyncio.create_task(hub.stopped.wait())
        try:
            while not hub.stopped.is_set():
                news = asyncio.create_task(self.changed(owner).next().wait())
                try:
                    while found := await hub.stored(store.changes, owner, after):
                        for number, change in found:
                            if change is not None:
                                yield sse.event(change, number=number)
                            after = number
                    await asyncio.wait({news, end}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    news.cancel()
        finally:
            end.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await end


def _texts(events: list[tuple[int, str, str]]) -> dict[str, str]:
    texts = {"reasoning": "", "text": ""}
    for _, kind, data in events:
        if kind == "delta":
            delta = json.loads(data)
            texts[delta["part"]] += delta["text"]
    return texts


def _sse(number: int, kind: str, data: str) -> bytes:
    return f"id: {number}\nevent: {kind}\ndata: {data}\n\n".encode()


def conversation(messages: list[dict[str, Any]], leaf: str) -> list[dict[str, Any]]:
    """The branch from its root to `leaf`, as the template reads it; empty if there is no such message."""
    by_id = {message["id"]: message for message in messages}
    branch: list[dict[str, Any]] = []
    while (message := by_id.pop(leaf, None)) is not None:  # popped: a circle ends
        branch.append({"role": message["role"], "content": text_of(message["parts"])})
        leaf = message["parent"]
    return branch[::-1]
