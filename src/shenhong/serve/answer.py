"""From the engine's events to the parts of an answer: text, thinking and calls of tools, in deltas or as a whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shenhong.chat.thinking import Thinking, Thoughts
from shenhong.chat.tool_calls import Call, Calls, joined
from shenhong.engine.request import TokenLogprob, Usage
from shenhong.serve.engine_thread import Stream
from shenhong.serve.generation import GenerationRequest
from shenhong.serve.http.faults import Fault, bad
from shenhong.serve.hub import Served

NOTHING = Usage(0, 0, 0)

Texts = list[tuple[str, str]]  # ("text" or "reasoning", what was written of it)


class Delta(NamedTuple):
    """What is new of one answer. `thought`: how many of its tokens are thinking; `finish`: in the last one alone."""

    texts: Texts
    calls: list[Call]
    thought: int
    logprobs: list[TokenLogprob]
    finish: str | None
    usage: Usage | None


async def deltas(
    model: Served, stream: Stream, generation: GenerationRequest
) -> AsyncGenerator[Delta, None]:
    """One answer as it comes; what came while the reader was busy is one delta. Errors: Fault."""
    thinks = model.template.thinking and generation.thinking is not None
    inside = bool(generation.thinking)
    thinking, thoughts = Thinking(thinks, inside), Thoughts(model.bytes_of, thinks, inside)
    reader = Calls(generation.offer) if generation.offer else None
    called = False
    async for events in stream:
        text = "".join(event.text for event in events)
        finish: str | None = events[-1].finish if events else None
        if finish == "error" and stream.request.constraint is not None:  # too hard to follow
            why = events[-1].error or "the constraint failed"
            raise bad(why, generation.names.response_format, "constraint")
        if finish == "error":
            raise Fault(500, events[-1].error or "the engine failed", code="engine_error")
        texts = thinking.feed(text, last=finish is not None)
        calls: list[Call] = []
        if reader is not None:
            texts, calls = _without_calls(reader, texts, finish is not None)
            called = called or bool(calls)
        yield Delta(
            texts,
            calls,
            thoughts.among(token for event in events for token in event.tokens),
            [logprob for event in events for logprob in event.logprobs],
            "tool_calls" if called and finish == "stop" else finish,
            events[-1].usage if events else None,
        )


def _without_calls(reader: Calls, texts: Texts, last: bool) -> tuple[Texts, list[Call]]:
    """Calls stand in the text, never in thinking."""
    rest = [part for part in texts if part[0] != "text"]
    text, calls = reader.feed("".join(text for part, text in texts if part == "text"), last)
    return [*rest, ("text", text)] if text else rest, calls


@dataclass
class Answer:
    """A whole answer."""

    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    thought: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str = "stop"
    usage: Usage = NOTHING

    def add(self, delta: Delta) -> None:
        for part, text in delta.texts:
            if part == "text":
                self.text += text
            else:
                self.reasoning += text
        self.calls = joined(self.calls, delta.calls)
        self.thought += delta.thought
        self.logprobs += delta.logprobs
        self.finish = delta.finish or self.finish
        self.usage = delta.usage or self.usage


# ------------------------------------------------------------------------ several answers


def close(streams: list[Stream]) -> None:
    for stream in streams:
        stream.close()


async def merged(
    model: Served, streams: list[Stream], generation: GenerationRequest
) -> AsyncGenerator[tuple[int, Delta], None]:
    """The deltas of all streams as they come, each with the number of its stream."""
    if len(streams) == 1:
        async for delta in deltas(model, streams[0], generation):
            yield 0, delta
        return
    # At most one delta of each stream is waiting here; the rest waits, joined, in the stream itself.
    waiting: dict[asyncio.Future[Delta], tuple[int, AsyncGenerator[Delta, None]]] = {}
    for index, stream in enumerate(streams):
        source = deltas(model, stream, generation)
        waiting[asyncio.ensure_future(anext(source))] = index, source
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                index, source = waiting.pop(future)
                delta = future.result()
                if delta.finish is None:
                    waiting[asyncio.ensure_future(anext(source))] = index, source
                yield index, delta
    finally:
        for future in waiting:
            future.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def collect(
    model: Served, streams: list[Stream], generation: GenerationRequest
) -> list[Answer]:
    """All answers, whole; none goes on when the caller leaves or one of them fails."""
    answers = [Answer() for _ in streams]
    try:
        async with aclosing(merged(model, streams, generation)) as source:
            async for index, delta in source:
                answers[index].add(delta)
        return answers
    finally:
        close(streams)


def usage_json(usages: Sequence[Usage], prompts: int = 1, thought: int = 0) -> dict[str, Any]:
    """Each prompt counts once, however many answers it has. `thought`: tokens of thinking in all."""
    per = max(1, len(usages) // prompts)
    read = sum(usage.prompt_tokens for usage in usages[::per])
    written = sum(usage.completion_tokens for usage in usages)
    cached = sum(usage.cached_tokens for usage in usages[::per])
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": thought},
    }
