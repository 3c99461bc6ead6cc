"""One thread per model drives its engine; everyone else speaks to it through queues.

    event loop ── submit, cancel ──▶ deque ──▶ engine thread: submit, cancel, step
    Stream     ◀── one call_soon_threadsafe a step ────────────┘

Only its own thread calls the engine, except to compile a constraint: that may take long, and runs in a thread where it
holds up nothing else. Events that a reader has not taken yet wait in its stream, bounded by the length of the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import cast

from shenhong.engine import Engine
from shenhong.engine.request import Constraint, EngineStats, Event, Request
from shenhong.engine.structured import Matcher
from shenhong.errors import RequestError
from shenhong.serve.http.faults import Fault, bad, stopping

log = logging.getLogger("shenhong")

COMPILE_SECONDS = 5.0  # longest time a constraint may take before its text begins
COMPILING = 2  # at once


class Stream:
    """The events of one request, for one reader on the event loop. Closing it cancels the request."""

    def __init__(
        self, thread: EngineThread, request: Request, on_end: Callable[[Stream], None]
    ) -> None:
        self.thread, self.request, self.on_end = thread, request, on_end
        self.id: int | None = None
        self.matcher: Matcher | None = None
        self.accepted = self.ended = False
        self.written = 0  # tokens
        self._events: deque[Event | Exception] = deque()
        self._wake = asyncio.Event()

    def put(self, item: Event | Exception) -> None:
        """On the event loop. After the end nothing more is taken."""
        if self.ended:
            return
        if isinstance(item, Event):
            self.written += len(item.tokens)
        if isinstance(item, Exception) or item.finish is not None:
            self._end()
        self._events.append(item)
        self._wake.set()

    async def __aiter__(self) -> AsyncIterator[list[Event]]:
        """Lists of events that came meanwhile; the last event of all has a finish. Errors: Fault."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            events: list[Event] = []
            while self._events:
                item = self._events.popleft()
                if isinstance(item, Exception):
                    if events:
                        yield events
                    raise item
                events.append(item)
            yield events
            if events and events[-1].finish is not None:
                return

    def close(self) -> None:
        """Cancel what is not finished; harmless when it is."""
        if not self.ended:
            self._end()
            self.thread.post(lambda: self.thread.cancel(self))

    def abort(self, error: Exception) -> None:
        """Cancel, and let the reader meet `error` after what is already here."""
        if not self.ended:
            self.put(error)
            self.thread.post(lambda: self.thread.cancel(self))

    def _end(self) -> None:
        self.ended = True
        self.thread.live.discard(self)
        if self.accepted:
            self.on_end(self)


class EngineThread:
    """Start it inside a running event loop; `stop` it there too."""

    def __init__(self, engine: Engine, name: str, max_queue: int) -> None:
        self.engine, self.name, self.max_queue = engine, name, max_queue
        self.live: set[Stream] = set()  # on the event loop's side
        self.failures = 0  # steps that raised
        self.failed = False  # for good: it cannot be emptied, or fails without any text
        self._loop = asyncio.get_running_loop()
        self._compiling = asyncio.Semaphore(COMPILING)
        self._commands: deque[Callable[[], None]] = deque()
        self._bell = threading.Condition()
        self._streams: dict[int, Stream] = {}  # on the thread's side
        self._stopped = False
        self.stats: EngineStats = engine.stats()
        self._thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- on the event loop

    async def submit(
        self, requests: list[Request], on_end: Callable[[Stream], None]
    ) -> list[Stream]:
        """Queue them all or none; `on_end` hears when each that was queued is over. Errors: RequestError (impossible), Fault 400 (a constraint), 429 (queue full) or 503 (stopped)."""
        if self._stopped:
            raise stopping()
        if len(self.live) + len(requests) > self.max_queue:
            raise Fault(
                429,
                f"{len(self.live)} answers are running or waiting, of at most {self.max_queue}; try again soon",
                code="queue_full",
                retry_after=2,
            )
        streams = [Stream(self, request, on_end) for request in requests]
        self.live.update(streams)
        try:
            await self._prepare(streams)
            if any(stream.ended for stream in streams):  # by a stop meanwhile
                raise stopping()
            done: asyncio.Future[None] = self._loop.create_future()
            self.post(lambda: self._submit(streams, done))
            await done
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return streams

    async def _prepare(self, streams: list[Stream]) -> None:
        """Each stream's own matcher; equal constraints are compiled once."""
        made: dict[Constraint, Matcher] = {}
        for stream in streams:
            if (constraint := stream.request.constraint) is not None:
                if constraint not in made:
                    made[constraint] = await self._compiled(constraint)
                stream.matcher = made[constraint].copy()

    async def _compiled(self, constraint: Constraint) -> Matcher:
        """In a daemon thread: not even the end of the process waits for it. Fault: 400."""
        found: asyncio.Future[Matcher] = self._loop.create_future()

        def resolve(matcher: Matcher | None, error: Exception | None) -> None:
            self._compiling.release()
            if not found.done():
                found.set_exception(error) if error else found.set_result(cast(Matcher, matcher))

        def compile() -> None:
            matcher, error = None, None
            try:
                matcher = self.engine.compiled(constraint)
            except Exception as raised:
                error = raised
            self._call(lambda: resolve(matcher, error))

        try:
            async with asyncio.timeout(COMPILE_SECONDS):
                await self._compiling.acquire()  # until its thread ends, however late that is
                threading.Thread(target=compile, name="compile", daemon=True).start()
                return await found
        except RequestError as error:
            raise bad(str(error), code="constraint") from None
        except TimeoutError:
            raise bad(
                f"{constraint.kind} constraint: it is not ready within {COMPILE_SECONDS:g} s; make it simpler, or ask again",
                code="constraint",
            ) from None

    def post(self, command: Callable[[], None]) -> None:
        with self._bell:
            self._commands.append(command)
            self._bell.notify()

    def fail(self, error: Exception) -> None:
        """End everything that runs, with this error for each reader."""
        for stream in list(self.live):
            stream.abort(error)

    def stop(self) -> None:
        self._stopped = True
        self.fail(stopping())
        self.post(lambda: None)

    async def join(self) -> None:
        await asyncio.to_thread(self._thread.join, 10)

    # ---------------------------------------------------------------- on the thread

    def _submit(self, streams: list[Stream], done: asyncio.Future[None]) -> None:
        error: Exception | None = self._failure() if self.failed else None
        try:
            for stream in () if error else streams:
                stream.id = self.engine.submit(stream.request, stream.matcher)
                self._streams[stream.id] = stream
        except Exception as raised:
            if not isinstance(raised, RequestError):
                log.exception("the engine of %s failed on a request", self.name)
            error = raised

        def answer() -> None:
            for stream in streams:
                stream.accepted = error is None
            if not done.done():
                done.set_result(None) if error is None else done.set_exception(error)

        try:
            for stream in streams if error else ():
                self.cancel(stream)
        finally:
            self._call(answer)

    def cancel(self, stream: Stream) -> None:
        if stream.id is not None and self._streams.pop(stream.id, None) is not None:
            self.engine.cancel(stream.id)

    @property
    def _busy(self) -> bool:
        return self.engine.busy and not self.failed

    def _run(self) -> None:
        while True:
            with self._bell:
                while not self._commands and not self._busy and not self._stopped:
                    self._bell.wait()
            try:
                while self._commands:
                    self._commands.popleft()()
                if self._stopped and not self._streams:
                    return
                if self._busy:
                    self._deliver(self.engine.step())
                    self.stats = self.engine.stats()
            except Exception as error:
                self._broke(error)

    def _deliver(self, events: list[Event]) -> None:
        found: list[tuple[Stream, Event | Exception]] = []
        for event in events:
            stream = self._streams.get(event.request)
            if event.finish is not None:
                self._streams.pop(event.request, None)
            if stream is not None:
                found.append((stream, event))
        if found:
            self._put(found)

    def _broke(self, error: Exception) -> None:
        """A step raised: every reader gets an error, and the engine goes on empty. Where it cannot, it has failed for good."""
        log.error("the engine of %s failed", self.name, exc_info=error)
        self.failures += 1
        streams, self._streams = list(self._streams.values()), {}
        try:
            for stream in streams:
                assert stream.id is not None
                self.engine.cancel(stream.id)
        except Exception:
            log.exception("the engine of %s cannot be emptied", self.name)
            self.failed = True
        self.failed = self.failed or not streams
        fault = Fault(500, "the engine failed on this answer; ask again", code="engine_error")
        fault = self._failure() if self.failed else fault
        self._put([(stream, fault) for stream in streams])

    def _failure(self) -> Fault:
        what = f"the engine of {self.name} has failed; restart the server"
        return Fault(503, what, code="engine_failed")

    def _put(self, found: list[tuple[Stream, Event | Exception]]) -> None:
        def put() -> None:
            for stream, item in found:
                stream.put(item)

        self._call(put)

    def _call(self, function: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is gone
            self._loop.call_soon_threadsafe(function)
