"""/v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from shenhong.serve.answer import NOTHING, close, collect, merged, usage_json
from shenhong.serve.engine_thread import Stream
from shenhong.serve.generation import FieldNames, GenerationRequest, check_count, start
from shenhong.serve.http import sse
from shenhong.serve.http.bodies import CheckedRoute, aside, size_of
from shenhong.serve.hub import Served
from shenhong.serve.openai.admission import admit
from shenhong.serve.openai.constraints import constraint_of, response_format_name
from shenhong.serve.openai.logprobs import completion_logprobs
from shenhong.serve.openai.schemas import CompletionRequest
from shenhong.serve.page.store import new_id

router = APIRouter(route_class=CheckedRoute)


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionRequest) -> Response:
    hub, owner, model = admit(request, body)
    n, size = body.n or 1, await size_of(request)
    given = body.prompt
    several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    names = FieldNames(
        "prompt", response_format=response_format_name(body), n="n" if n > 1 else "prompt"
    )
    check_count(hub.limits, n * len(several), names.n)  # before any of them is read
    constraint = await aside(
        size, constraint_of, hub.limits, body.response_format, body.structured_outputs
    )
    generations = [
        GenerationRequest(
            prompt,
            body,
            max_tokens=body.max_tokens,
            n=n,
            logprobs=body.logprobs,
            constraint=constraint,
            first=number * n,
            names=names,
        )
        for number, prompt in enumerate([await _tokens(model, one) for one in several])
    ]
    streams = await sse.unless_gone(request, start(hub, model, owner, generations))
    head = {
        "id": f"cmpl-{new_id()}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model.id,
    }
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        chunks = _completion_chunks(model, streams, generations, body, head, usage)
        return sse.EventStream(sse.faults_as_events(chunks), lambda: close(streams))
    answers = await sse.unless_gone(request, collect(model, streams, generations[0]))
    choices = [
        {
            "index": number,
            "text": answer.text,
            "logprobs": completion_logprobs(model, body, answer.logprobs, 0),
            "finish_reason": answer.finish,
        }
        for number, answer in enumerate(answers)
    ]
    usage_of = usage_json([answer.usage for answer in answers], len(generations))
    return JSONResponse(head | {"choices": choices, "usage": usage_of})


async def _tokens(model: Served, prompt: Any) -> list[int]:
    """Text begins with the model's first token; tokens are taken as they are."""
    if not isinstance(prompt, str):
        return list(prompt)
    tokenizer = model.llm.tokenizer
    return [*tokenizer.begin, *await aside(len(prompt), tokenizer.encode, prompt)]


async def _completion_chunks(
    model: Served,
    streams: list[Stream],
    generations: list[GenerationRequest],
    body: CompletionRequest,
    head: dict[str, Any],
    with_usage: bool,
) -> AsyncGenerator[bytes, None]:
    none = {"usage": None} if with_usage else {}
    offsets = [0] * len(streams)
    usages = [NOTHING] * len(streams)
    try:
        async with aclosing(merged(model, streams, generations[0])) as source:
            async for index, delta in source:
                text = "".join(text for _, text in delta.texts)
                choice = {
                    "index": index,
                    "text": text,
                    "logprobs": completion_logprobs(model, body, delta.logprobs, offsets[index]),
                    "finish_reason": delta.finish,
                }
                offsets[index] += len(text)
                usages[index] = delta.usage or usages[index]
                if text or delta.finish or delta.logprobs:
                    yield sse.event(head | {"choices": [choice]} | none)
        if with_usage:
            yield sse.event(head | {"choices": [], "usage": usage_json(usages, len(generations))})
        yield sse.DONE
    finally:
        close(streams)
