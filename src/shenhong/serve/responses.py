"""/v1/responses: the newer shape of the same thing. Nothing is kept, so an earlier response cannot be named."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from shenhong.engine.request import Usage
from shenhong.serve import sse
from shenhong.serve.engine_thread import Stream
from shenhong.serve.faults import Fault, bad
from shenhong.serve.generation import Answer, Ask, begin, constraint_of, text_of_content
from shenhong.serve.hub import Served
from shenhong.serve.openai_api import close, collect, opening, together
from shenhong.serve.schemas import Drawing, ResponsesRequest
from shenhong.serve.store import new_id

router = APIRouter()


@router.post("/v1/responses")
async def responses(request: Request, body: ResponsesRequest) -> Response:
    hub, owner, model = opening(request, body)
    if body.stream_options and body.stream_options.include_usage:
        raise bad("a response always tells its usage", "stream_options.include_usage")
    prompt, thinking = await model.template.prompt(_messages(body))
    form = body.text.format if body.text else None
    ask = Ask(
        prompt,
        Drawing(temperature=body.temperature, top_p=body.top_p),
        max_tokens=body.max_output_tokens,
        constraint=constraint_of(hub.limits, form, None),
        thinking=thinking,
    )
    streams = await begin(hub, model, owner, [ask])
    made = _Response(model, body)
    if body.stream:
        return sse.EventStream(_told(_events(model, streams, ask, made)))
    (answer,) = await sse.unless_gone(request, collect(model, streams, ask))
    return JSONResponse(made.whole(answer))


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    found = [{"role": "system", "content": body.instructions}] if body.instructions else []
    if isinstance(body.input, str):
        return [*found, {"role": "user", "content": body.input}]
    for message in body.input:
        role = "system" if message.role == "developer" else message.role
        found.append({"role": role, "content": text_of_content(message.content)})
    return found


class _Response:
    """The object of one response, as it stands at each moment."""

    def __init__(self, model: Served, body: ResponsesRequest) -> None:
        self.model, self.body = model, body
        self.id, self.item_id = f"resp_{new_id()}", f"msg_{new_id()}"
        self.created = int(time.time())

    def part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def item(self, text: str | None, status: str) -> dict[str, Any]:
        content = [] if text is None else [self.part(text)]
        return {
            "id": self.item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def whole(
        self, answer: Answer | None, status: str = "completed", error: Any = None
    ) -> dict[str, Any]:
        body = self.body
        cut = answer is not None and answer.finish == "length"
        status = "incomplete" if cut else status
        text = body.text.format if body.text else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.model.id,
            "output": [self.item(answer.text, status)] if answer else [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "text": {"format": text.model_dump(by_alias=True) if text else {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "truncation": "disabled",
            "usage": _usage(answer.usage) if answer else None,
        }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


async def _events(
    model: Served, streams: list[Stream], ask: Ask, made: _Response
) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
    place = {"item_id": made.item_id, "output_index": 0, "content_index": 0}
    answer = Answer()
    try:
        for kind in ("response.created", "response.in_progress"):
            yield kind, {"response": made.whole(None, "in_progress")}
        item = made.item(None, "in_progress")
        yield "response.output_item.added", {"output_index": 0, "item": item}
        yield "response.content_part.added", place | {"part": made.part("")}
        async with aclosing(together(model, streams, ask)) as merged:
            async for _, piece in merged:
                answer.add(piece)
                if text := "".join(text for part, text in piece.said if part == "text"):
                    yield "response.output_text.delta", place | {"delta": text, "logprobs": []}
        yield "response.output_text.done", place | {"text": answer.text, "logprobs": []}
        yield "response.content_part.done", place | {"part": made.part(answer.text)}
        whole = made.whole(answer)
        yield "response.output_item.done", {"output_index": 0, "item": whole["output"][0]}
        yield f"response.{whole['status']}", {"response": whole}
    except Fault as fault:
        error = {"code": "server_error", "message": fault.message}
        yield "response.failed", {"response": made.whole(None, "failed", error)}
    finally:
        close(streams)


async def _told(
    source: AsyncGenerator[tuple[str, dict[str, Any]], None],
) -> AsyncGenerator[bytes, None]:
    """Each event says its kind twice and has a number, as the specification wants."""
    number = 0
    async with aclosing(source):
        async for kind, data in source:
            yield sse.event({"type": kind, "sequence_number": number} | data, kind)
            number += 1
