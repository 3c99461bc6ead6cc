"""/v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from shenhong.chat.tool_calls import Offer
from shenhong.engine.request import Constraint
from shenhong.serve.answer import NOTHING, Answer, close, collect, merged, usage_json
from shenhong.serve.engine_thread import Stream
from shenhong.serve.generation import FieldNames, GenerationRequest, start
from shenhong.serve.http import sse
from shenhong.serve.http.bodies import CheckedRoute, aside, size_of
from shenhong.serve.http.faults import bad
from shenhong.serve.hub import Served
from shenhong.serve.openai.admission import admit
from shenhong.serve.openai.constraints import constraint_of, response_format_name
from shenhong.serve.openai.logprobs import chat_logprobs
from shenhong.serve.openai.messages import template_messages, template_variables
from shenhong.serve.openai.schemas import ChatRequest
from shenhong.serve.openai.tools import calls_constraint, offer_of
from shenhong.serve.page.store import new_id
from shenhong.serve.settings import Limits

router = APIRouter(route_class=CheckedRoute)


@router.post("/v1/chat/completions")
async def chat(request: Request, body: ChatRequest) -> Response:
    hub, owner, model = admit(request, body)
    if body.top_logprobs and not body.logprobs:
        raise bad("top_logprobs needs logprobs: true", "top_logprobs", "conflict")
    if body.max_tokens and body.max_completion_tokens not in (None, body.max_tokens):
        raise bad("max_tokens and max_completion_tokens differ", "max_tokens", "conflict")
    size = await size_of(request)
    asked = await aside(size, _asked, model, hub.limits, body)
    prompt, thinking = await model.template.prompt(
        asked.messages, asked.variables, tools=asked.tools
    )
    constraint = asked.form or await aside(
        size, calls_constraint, hub.limits, asked.offer, body, thinking
    )
    generation = GenerationRequest(
        prompt,
        body,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        n=body.n or 1,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        constraint=constraint,
        thinking=thinking,
        offer=asked.offer,
        names=FieldNames(
            max_tokens="max_completion_tokens" if body.max_completion_tokens else "max_tokens",
            response_format="tools" if asked.offer else response_format_name(body),
        ),
    )
    streams = await sse.unless_gone(request, start(hub, model, owner, [generation]))
    head = {"id": f"chatcmpl-{new_id()}", "created": int(time.time()), "model": model.id}
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        chunks = _chat_chunks(model, streams, generation, head, usage)
        return sse.EventStream(sse.faults_as_events(chunks), lambda: close(streams))
    answers = await sse.unless_gone(request, collect(model, streams, generation))
    choices = [
        {
            "index": number,
            "message": _chat_message(model, answer),
            "logprobs": chat_logprobs(model, generation, answer.logprobs),
            "finish_reason": answer.finish,
        }
        for number, answer in enumerate(answers)
    ]
    thought = sum(answer.thought for answer in answers)
    usage_of = usage_json([answer.usage for answer in answers], thought=thought)
    return JSONResponse(head | {"object": "chat.completion", "choices": choices, "usage": usage_of})


class _Asked(NamedTuple):
    """`form`: of the answer. The others are for the template."""

    form: Constraint | None
    offer: Offer | None
    messages: list[dict[str, Any]]
    variables: dict[str, Any]
    tools: list[dict[str, Any]]


def _asked(model: Served, limits: Limits, body: ChatRequest) -> _Asked:
    """What a body asks for. Fault: 400 for what cannot be had."""
    form = constraint_of(limits, body.response_format, body.structured_outputs)
    offer = offer_of(model, limits, body)
    if offer and form:
        raise bad("give either tools or a form of the answer", "tools", "conflict")
    return _Asked(
        form,
        offer,
        template_messages(model, body.messages),
        template_variables(model, body.chat_template_kwargs),
        [tool.model_dump(exclude_none=True) for tool in body.tools or []] if offer else [],
    )


def _chat_message(model: Served, answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if model.template.thinking:
        message["reasoning_content"] = answer.reasoning or None
    if answer.calls:
        message["content"] = answer.text or None
        message["tool_calls"] = [call.json() for call in answer.calls]
    return message


async def _chat_chunks(
    model: Served,
    streams: list[Stream],
    generation: GenerationRequest,
    head: dict[str, Any],
    with_usage: bool,
) -> AsyncGenerator[bytes, None]:
    head = head | {"object": "chat.completion.chunk"}
    # With include_usage every chunk has the field, null but in the last.
    none = {"usage": None} if with_usage else {}

    def chunk(
        index: int, delta: dict[str, Any], finish: str | None = None, more: Any = None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": more, "finish_reason": finish}
        return sse.event(head | {"choices": [choice]} | none)

    try:
        for index in range(len(streams)):
            yield chunk(index, {"role": "assistant", "content": ""})
        usages, thought = [], 0
        calls = [0] * len(streams)  # how many began
        async with aclosing(merged(model, streams, generation)) as source:
            async for index, delta in source:
                thought += delta.thought
                logprobs = (
                    chat_logprobs(model, generation, delta.logprobs) if delta.logprobs else None
                )
                for part, text in delta.texts:
                    name = "content" if part == "text" else "reasoning_content"
                    yield chunk(index, {name: text}, more=logprobs)
                    logprobs = None
                for call in delta.calls:
                    calls[index] += bool(call.name)
                    new = {"index": calls[index] - 1} | call.json()
                    yield chunk(index, {"tool_calls": [new]})
                if logprobs is not None and logprobs["content"]:
                    yield chunk(index, {"content": ""}, more=logprobs)
                if delta.finish:
                    yield chunk(index, {}, delta.finish)
                    usages.append(delta.usage or NOTHING)
        if with_usage:
            yield sse.event(head | {"choices": [], "usage": usage_json(usages, thought=thought)})
        yield sse.DONE
    finally:
        close(streams)
