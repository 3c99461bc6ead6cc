"""/v1/responses: the newer shape of the same thing. Nothing is kept, so an earlier response cannot be named."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from shenhong.serve.engine_thread import Stream
from shenhong.serve.generation import (
    Answer,
    Ask,
    Fields,
    Piece,
    begin,
    constraint_of,
    text_of_content,
    thought_before,
)
from shenhong.serve.http import sse
from shenhong.serve.http.faults import Fault, bad
from shenhong.serve.hub import Served
from shenhong.serve.openai.api import close, opening, together
from shenhong.serve.openai.schemas import Drawing, ReasoningItem, ResponsesRequest
from shenhong.serve.page.store import new_id

router = APIRouter()

Told = tuple[str, dict[str, Any]]  # an event: its kind and what it says


@router.post("/v1/responses")
async def responses(request: Request, body: ResponsesRequest) -> Response:
    hub, owner, model = opening(request, body)
    if body.stream_options and body.stream_options.include_usage:
        raise bad("a response always tells its usage", "stream_options.include_usage")
    prompt, thinking = await model.template.prompt(_messages(model, body))
    form = body.text.format if body.text else None
    ask = Ask(
        prompt,
        Drawing(temperature=body.temperature, top_p=body.top_p),
        max_tokens=body.max_output_tokens,
        constraint=constraint_of(hub.limits, form, None),
        thinking=thinking,
        fields=Fields("input", "max_output_tokens", "text"),
    )
    streams = await sse.unless_gone(request, begin(hub, model, owner, [ask]))
    made = _Response(model, body)
    if body.stream:
        told = _told(_events(model, streams, ask, made))
        return sse.EventStream(told, lambda: close(streams))
    await sse.unless_gone(request, _write(model, streams, ask, made))
    return JSONResponse(made.now())


def _messages(model: Served, body: ResponsesRequest) -> list[dict[str, Any]]:
    """As the template reads them; thinking belongs to the assistant's message behind it. Fault: 400."""
    found = [{"role": "system", "content": body.instructions}] if body.instructions else []
    if isinstance(body.input, str):
        return [*found, {"role": "user", "content": body.input}]
    thought: dict[str, Any] = {}
    for number, item in enumerate(body.input):
        where = f"input.{number}"
        if isinstance(item, ReasoningItem):
            text = "".join(part.text for part in item.content or [])
            thought = {"reasoning_content": thought_before(model, text, where)}
            continue
        role = "system" if item.role == "developer" else item.role
        if thought and role != "assistant":
            raise bad("no message of the assistant follows the reasoning before it", where)
        found.append({"role": role, "content": text_of_content(item.content), **thought})
        thought = {}
    if thought:
        raise bad("no message of the assistant follows the last reasoning", "input")
    return found


class _Response:
    """The object of one response as it stands at each moment; `begin`, `add` and `end` tell what changes."""

    def __init__(self, model: Served, body: ResponsesRequest) -> None:
        self.model, self.body = model, body
        self.id, self.created = f"resp_{new_id()}", int(time.time())
        self.status = "in_progress"
        self.error: dict[str, str] | None = None
        self.items: list[_Item] = []
        self.answer = Answer()

    def begin(self) -> Iterator[Told]:
        for kind in ("response.created", "response.in_progress"):
            yield kind, {"response": self.now()}

    def add(self, piece: Piece) -> Iterator[Told]:
        """A new item begins where the answer turns from thinking to text or back."""
        self.answer.add(piece)
        for part, text in piece.said:
            if not self.items or self.items[-1].part != part:
                yield from self._end_item("completed")
                yield from self._begin_item(part)
            yield self.items[-1].more(text)

    def end(self) -> Iterator[Told]:
        """The last events. An answer without any text is an empty message."""
        self.status = "incomplete" if self.answer.finish == "length" else "completed"
        if not self.items:
            yield from self._begin_item("text")
        yield from self._end_item(self.status)
        yield f"response.{self.status}", {"response": self.now()}

    def fail(self, message: str) -> Told:
        self.status, self.error = "failed", {"code": "server_error", "message": message}
        return "response.failed", {"response": self.now()}

    def _begin_item(self, part: str) -> Iterator[Told]:
        self.items.append(_Item(part, len(self.items)))
        yield from self.items[-1].begin()

    def _end_item(self, status: str) -> Iterator[Told]:
        if self.items:
            yield from self.items[-1].end(status)

    def now(self) -> dict[str, Any]:
        body = self.body
        text = body.text.format if body.text else None
        over = self.status in ("completed", "incomplete")
        cut = self.status == "incomplete"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": self.status,
            "error": self.error,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.model.id,
            "output": [item.now() for item in self.items] if over else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "text": {"format": text.model_dump(by_alias=True) if text else {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [],
            "truncation": "disabled",
            "usage": self._usage() if over else None,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self.answer.usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self.answer.thought},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }


class _Item:
    """A message or a piece of reasoning; each has one part, whose text grows."""

    def __init__(self, part: str, number: int) -> None:
        self.part, self.text, self.status = part, "", "in_progress"
        self.id = f"{'msg' if part == 'text' else 'rs'}_{new_id()}"
        self.kind = "output_text" if part == "text" else "reasoning_text"
        self.output = {"output_index": number}
        self.place = {"item_id": self.id, "output_index": number, "content_index": 0}

    def begin(self) -> Iterator[Told]:
        yield "response.output_item.added", self.output | {"item": self.now() | {"content": []}}
        yield "response.content_part.added", self.place | {"part": self._part()}

    def more(self, text: str) -> Told:
        self.text += text
        return f"response.{self.kind}.delta", self.place | {"delta": text} | self._logprobs()

    def end(self, status: str) -> Iterator[Told]:
        self.status = status
        yield f"response.{self.kind}.done", self.place | {"text": self.text} | self._logprobs()
        yield "response.content_part.done", self.place | {"part": self._part()}
        yield "response.output_item.done", self.output | {"item": self.now()}

    def now(self) -> dict[str, Any]:
        whole = {"id": self.id, "status": self.status, "content": [self._part()]}
        if self.part == "text":
            return whole | {"type": "message", "role": "assistant"}
        return whole | {"type": "reasoning", "summary": []}

    def _part(self) -> dict[str, Any]:
        notes: dict[str, Any] = {"annotations": []} if self.part == "text" else {}
        return {"type": self.kind, "text": self.text} | notes | self._logprobs()

    def _logprobs(self) -> dict[str, Any]:
        return {"logprobs": []} if self.part == "text" else {}


async def _write(model: Served, streams: list[Stream], ask: Ask, made: _Response) -> None:
    async for _ in _changes(model, streams, ask, made):
        pass


async def _changes(
    model: Served, streams: list[Stream], ask: Ask, made: _Response
) -> AsyncGenerator[Told, None]:
    """Everything that is new about a response until it is over. Errors: Fault."""
    try:
        for told in made.begin():
            yield told
        async with aclosing(together(model, streams, ask)) as merged:
            async for _, piece in merged:
                for told in made.add(piece):
                    yield told
        for told in made.end():
            yield told
    finally:
        close(streams)


async def _events(
    model: Served, streams: list[Stream], ask: Ask, made: _Response
) -> AsyncGenerator[Told, None]:
    async with aclosing(_changes(model, streams, ask, made)) as changes:
        try:
            async for told in changes:
                yield told
        except Fault as fault:
            yield made.fail(fault.message)


async def _told(source: AsyncGenerator[Told, None]) -> AsyncGenerator[bytes, None]:
    """Each event says its kind twice and has a number, as the specification wants."""
    number = 0
    async with aclosing(source):
        async for kind, data in source:
            yield sse.event({"type": kind, "sequence_number": number} | data, kind)
            number += 1
