"""/v1/responses: the newer shape of the same thing. Nothing is kept, so an earlier response cannot be named."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from shenhong.serve.answer import Answer, Delta, close, merged
from shenhong.serve.engine_thread import Stream
from shenhong.serve.generation import FieldNames, GenerationRequest, start
from shenhong.serve.http import sse
from shenhong.serve.http.bodies import CheckedRoute, aside, size_of
from shenhong.serve.http.faults import Fault, bad
from shenhong.serve.http.fields import SamplingFields
from shenhong.serve.hub import Served
from shenhong.serve.openai.admission import admit
from shenhong.serve.openai.constraints import constraint_of
from shenhong.serve.openai.messages import text_of_content, thought_before
from shenhong.serve.openai.schemas import ReasoningItem, ResponsesRequest
from shenhong.serve.page.store import new_id

router = APIRouter(route_class=CheckedRoute)

Event = tuple[str, dict[str, Any]]  # its kind and its data


@router.post("/v1/responses")
async def responses(request: Request, body: ResponsesRequest) -> Response:
    hub, owner, model = admit(request, body)
    if body.stream_options and body.stream_options.include_usage:
        raise bad("a response always tells its usage", "stream_options.include_usage")
    size, text_format = await size_of(request), body.text.format if body.text else None
    messages = await aside(size, _messages, model, body)
    constraint = await aside(size, constraint_of, hub.limits, text_format, None)
    prompt, thinking = await model.template.prompt(messages)
    generation = GenerationRequest(
        prompt,
        SamplingFields(temperature=body.temperature, top_p=body.top_p),
        max_tokens=body.max_output_tokens,
        constraint=constraint,
        thinking=thinking,
        names=FieldNames("input", "max_output_tokens", "text"),
    )
    streams = await sse.unless_gone(request, start(hub, model, owner, [generation]))
    made = _Response(model, body)
    if body.stream:
        encoded = _encoded(_events(model, streams, generation, made))
        return sse.EventStream(encoded, lambda: close(streams))
    await sse.unless_gone(request, _write(model, streams, generation, made))
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
    """The object of one response as it stands at each moment; `start`, `add` and `end` give the events of what changes."""

    def __init__(self, model: Served, body: ResponsesRequest) -> None:
        self.model, self.body = model, body
        self.id, self.created = f"resp_{new_id()}", int(time.time())
        self.status = "in_progress"
        self.error: dict[str, str] | None = None
        self.items: list[_Item] = []
        self.answer = Answer()

    def start(self) -> Iterator[Event]:
        for kind in ("response.created", "response.in_progress"):
            yield kind, {"response": self.now()}

    def add(self, delta: Delta) -> Iterator[Event]:
        """A new item begins where the answer turns from thinking to text or back."""
        self.answer.add(delta)
        for part, text in delta.texts:
            if not self.items or self.items[-1].part != part:
                yield from self._end_item("completed")
                yield from self._start_item(part)
            yield self.items[-1].more(text)

    def end(self) -> Iterator[Event]:
        """The last events. An answer without any text is an empty message."""
        self.status = "incomplete" if self.answer.finish == "length" else "completed"
        if not self.items:
            yield from self._start_item("text")
        yield from self._end_item(self.status)
        yield f"response.{self.status}", {"response": self.now()}

    def fail(self, message: str) -> Event:
        self.status, self.error = "failed", {"code": "server_error", "message": message}
        return "response.failed", {"response": self.now()}

    def _start_item(self, part: str) -> Iterator[Event]:
        self.items.append(_Item(part, len(self.items)))
        yield from self.items[-1].start()

    def _end_item(self, status: str) -> Iterator[Event]:
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
    """A message or an item of reasoning; each has one part, whose text grows."""

    def __init__(self, part: str, number: int) -> None:
        self.part, self.text, self.status = part, "", "in_progress"
        self.id = f"{'msg' if part == 'text' else 'rs'}_{new_id()}"
        self.kind = "output_text" if part == "text" else "reasoning_text"
        self.output = {"output_index": number}
        self.place = {"item_id": self.id, "output_index": number, "content_index": 0}

    def start(self) -> Iterator[Event]:
        yield "response.output_item.added", self.output | {"item": self.now() | {"content": []}}
        yield "response.content_part.added", self.place | {"part": self._part()}

    def more(self, text: str) -> Event:
        self.text += text
        return f"response.{self.kind}.delta", self.place | {"delta": text} | self._logprobs()

    def end(self, status: str) -> Iterator[Event]:
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


async def _write(
    model: Served, streams: list[Stream], generation: GenerationRequest, made: _Response
) -> None:
    async for _ in _changes(model, streams, generation, made):
        pass


async def _changes(
    model: Served, streams: list[Stream], generation: GenerationRequest, made: _Response
) -> AsyncGenerator[Event, None]:
    """Everything that is new about a response until it is over. Errors: Fault."""
    try:
        for event in made.start():
            yield event
        async with aclosing(merged(model, streams, generation)) as source:
            async for _, delta in source:
                for event in made.add(delta):
                    yield event
        for event in made.end():
            yield event
    finally:
        close(streams)


async def _events(
    model: Served, streams: list[Stream], generation: GenerationRequest, made: _Response
) -> AsyncGenerator[Event, None]:
    async with aclosing(_changes(model, streams, generation, made)) as changes:
        try:
            async for event in changes:
                yield event
        except Fault as fault:
            yield made.fail(fault.message)


async def _encoded(source: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
    """Each event names its kind twice and has a number, as the specification wants."""
    number = 0
    async with aclosing(source):
        async for kind, data in source:
            yield sse.event({"type": kind, "sequence_number": number} | data, kind)
            number += 1
