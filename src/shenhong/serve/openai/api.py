"""/v1/chat/completions, /v1/completions, /v1/models, /tokenize and /detokenize."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from shenhong.engine.request import TokenLogprob
from shenhong.serve.engine_thread import Stream
from shenhong.serve.generation import (
    NOTHING,
    Answer,
    Ask,
    Fields,
    Piece,
    begin,
    calls_constraint,
    constraint_of,
    pieces,
    plain_messages,
    template_variables,
    tools_of,
    usage_json,
)
from shenhong.serve.http import sse
from shenhong.serve.http.faults import bad
from shenhong.serve.hub import Hub, Served
from shenhong.serve.openai.sampling import sampling_json
from shenhong.serve.openai.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generating,
    TokenizeRequest,
)
from shenhong.serve.page.store import new_id

router = APIRouter()


def hub_of(request: Request) -> Hub:
    return request.app.state.hub


def owner_of(request: Request) -> str:
    return request.state.owner


def opening(request: Request, body: Generating) -> tuple[Hub, str, Served]:
    """What every call that has text written begins with: the meter, the model, what belongs together. Fault."""
    hub, owner = hub_of(request), owner_of(request)
    hub.meter.request(owner)
    model = hub.model(body.model)
    if body.stream_options and not body.stream:
        raise bad("stream_options belong to stream: true", "stream_options", "conflict")
    return hub, owner, model


# ------------------------------------------------------------------------ chat


@router.post("/v1/chat/completions")
async def chat(request: Request, body: ChatRequest) -> Response:
    hub, owner, model = opening(request, body)
    if body.top_logprobs and not body.logprobs:
        raise bad("top_logprobs needs logprobs: true", "top_logprobs", "conflict")
    if body.max_tokens and body.max_completion_tokens not in (None, body.max_tokens):
        raise bad("max_tokens and max_completion_tokens differ", "max_tokens", "conflict")
    limits = hub.limits
    form = constraint_of(limits, body.response_format, body.structured_outputs)
    offer = tools_of(model, limits, body)
    if offer and form:
        raise bad("give either tools or a form of the answer", "tools", "conflict")
    messages = plain_messages(model, limits, body.messages)
    variables = template_variables(model, body.chat_template_kwargs)
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []] if offer else []
    prompt, thinking = await model.template.prompt(messages, variables, tools=tools)
    ask = Ask(
        prompt,
        body,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        n=body.n or 1,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        constraint=form or calls_constraint(limits, offer, body, thinking),
        thinking=thinking,
        offer=offer,
        fields=Fields(
            tokens="max_completion_tokens" if body.max_completion_tokens else "max_tokens",
            form="tools" if offer else _form(body),
        ),
    )
    streams = await sse.unless_gone(request, begin(hub, model, owner, [ask]))
    head = {"id": f"chatcmpl-{new_id()}", "created": int(time.time()), "model": model.id}
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        chunks = _chat_chunks(model, streams, ask, head, usage)
        return sse.EventStream(sse.faults_told(chunks), lambda: close(streams))
    answers = await sse.unless_gone(request, collect(model, streams, ask))
    choices = [
        {
            "index": number,
            "message": _chat_message(model, answer),
            "logprobs": _chat_logprobs(model, ask, answer.logprobs),
            "finish_reason": answer.finish,
        }
        for number, answer in enumerate(answers)
    ]
    thought = sum(answer.thought for answer in answers)
    usage_of = usage_json([answer.usage for answer in answers], thought=thought)
    return JSONResponse(head | {"object": "chat.completion", "choices": choices, "usage": usage_of})


def _form(body: ChatRequest | CompletionRequest) -> str:
    return "structured_outputs" if body.structured_outputs else "response_format"


def _chat_message(model: Served, answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if model.template.thinking:
        message["reasoning_content"] = answer.reasoning or None
    if answer.calls:
        message["content"] = answer.text or None
        message["tool_calls"] = [call.json() for call in answer.calls]
    return message


async def _chat_chunks(
    model: Served, streams: list[Stream], ask: Ask, head: dict[str, Any], with_usage: bool
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
        async with aclosing(together(model, streams, ask)) as merged:
            async for index, piece in merged:
                thought += piece.thought
                logprobs = _chat_logprobs(model, ask, piece.logprobs) if piece.logprobs else None
                for part, text in piece.said:
                    name = "content" if part == "text" else "reasoning_content"
                    yield chunk(index, {name: text}, more=logprobs)
                    logprobs = None
                for call in piece.calls:
                    calls[index] += bool(call.name)
                    new = {"index": calls[index] - 1} | call.json()
                    yield chunk(index, {"tool_calls": [new]})
                if logprobs is not None and logprobs["content"]:
                    yield chunk(index, {"content": ""}, more=logprobs)
                if piece.finish:
                    yield chunk(index, {}, piece.finish)
                    usages.append(piece.usage or NOTHING)
        if with_usage:
            yield sse.event(head | {"choices": [], "usage": usage_json(usages, thought=thought)})
        yield sse.DONE
    finally:
        close(streams)


def _chat_logprobs(model: Served, ask: Ask, found: Sequence[TokenLogprob]) -> dict | None:
    if ask.logprobs is None:
        return None

    def named(token: int, logprob: float) -> dict[str, Any]:
        raw = model.bytes_of[token]
        return {
            "token": raw.decode("utf-8", "replace"),
            "bytes": list(raw),
            "logprob": _finite(logprob),
        }

    content = [
        named(one.token, one.logprob)
        | {"top_logprobs": [named(*pair) for pair in one.top[: ask.logprobs]]}
        for one in found
    ]
    return {"content": content, "refusal": None}


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON has no infinity; OpenAI writes this number


# ------------------------------------------------------------------------ many answers


def close(streams: list[Stream]) -> None:
    for stream in streams:
        stream.close()


async def collect(model: Served, streams: list[Stream], ask: Ask) -> list[Answer]:
    """All answers, whole; none goes on when the caller leaves or one fails."""
    answers = [Answer() for _ in streams]
    try:
        async with aclosing(together(model, streams, ask)) as merged:
            async for index, piece in merged:
                answers[index].add(piece)
        return answers
    finally:
        close(streams)


async def together(
    model: Served, streams: list[Stream], ask: Ask
) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of all streams as they come, each with the number of its stream."""
    if len(streams) == 1:
        async for piece in pieces(model, streams[0], ask):
            yield 0, piece
        return
    # One piece of each stream at most is waiting here; the rest waits, merged, in the stream itself.
    waiting: dict[asyncio.Future[Piece], tuple[int, AsyncGenerator[Piece, None]]] = {}
    for index, stream in enumerate(streams):
        source = pieces(model, stream, ask)
        waiting[asyncio.ensure_future(anext(source))] = index, source
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                index, source = waiting.pop(future)
                piece = future.result()
                if piece.finish is None:
                    waiting[asyncio.ensure_future(anext(source))] = index, source
                yield index, piece
    finally:
        for future in waiting:
            future.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


# ------------------------------------------------------------------------ completions


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionRequest) -> Response:
    hub, owner, model = opening(request, body)
    n = body.n or 1
    asks = [
        Ask(
            prompt,
            body,
            max_tokens=body.max_tokens,
            n=n,
            logprobs=body.logprobs,
            constraint=constraint_of(hub.limits, body.response_format, body.structured_outputs),
            first=number * n,
            fields=Fields("prompt", form=_form(body), several="n" if n > 1 else "prompt"),
        )
        for number, prompt in enumerate(await _prompts(model, body))
    ]
    streams = await sse.unless_gone(request, begin(hub, model, owner, asks))
    head = {
        "id": f"cmpl-{new_id()}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model.id,
    }
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        chunks = _completion_chunks(model, streams, asks, body, head, usage)
        return sse.EventStream(sse.faults_told(chunks), lambda: close(streams))
    answers = await sse.unless_gone(request, collect(model, streams, asks[0]))
    choices = [
        {
            "index": number,
            "text": answer.text,
            "logprobs": _completion_logprobs(model, body, answer.logprobs, 0),
            "finish_reason": answer.finish,
        }
        for number, answer in enumerate(answers)
    ]
    usage_of = usage_json([answer.usage for answer in answers], len(asks))
    return JSONResponse(head | {"choices": choices, "usage": usage_of})


async def _prompts(model: Served, body: CompletionRequest) -> list[list[int]]:
    """Text begins with the model's first token; tokens are taken as they are."""
    given = body.prompt
    several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    tokenizer = model.llm.tokenizer
    return [
        [*tokenizer.begin, *await asyncio.to_thread(tokenizer.encode, one)]
        if isinstance(one, str)
        else list(one)
        for one in several
    ]


async def _completion_chunks(
    model: Served,
    streams: list[Stream],
    asks: list[Ask],
    body: CompletionRequest,
    head: dict[str, Any],
    with_usage: bool,
) -> AsyncGenerator[bytes, None]:
    none = {"usage": None} if with_usage else {}
    offsets = [0] * len(streams)
    usages = [NOTHING] * len(streams)
    try:
        async with aclosing(together(model, streams, asks[0])) as merged:
            async for index, piece in merged:
                text = "".join(text for _, text in piece.said)
                choice = {
                    "index": index,
                    "text": text,
                    "logprobs": _completion_logprobs(model, body, piece.logprobs, offsets[index]),
                    "finish_reason": piece.finish,
                }
                offsets[index] += len(text)
                usages[index] = piece.usage or usages[index]
                if text or piece.finish or piece.logprobs:
                    yield sse.event(head | {"choices": [choice]} | none)
        if with_usage:
            yield sse.event(head | {"choices": [], "usage": usage_json(usages, len(asks))})
        yield sse.DONE
    finally:
        close(streams)


def _completion_logprobs(
    model: Served, body: CompletionRequest, found: Sequence[TokenLogprob], offset: int
) -> dict[str, Any] | None:
    if body.logprobs is None:
        return None

    def word(token: int) -> str:
        return model.bytes_of[token].decode("utf-8", "replace")

    offsets = []
    for one in found:
        offsets.append(offset)
        offset += len(word(one.token))
    return {
        "tokens": [word(one.token) for one in found],
        "token_logprobs": [_finite(one.logprob) for one in found],
        "top_logprobs": [
            {word(token): _finite(logprob) for token, logprob in one.top[: body.logprobs]}
            for one in found
        ],
        "text_offset": offsets,
    }


# ------------------------------------------------------------------------ models and tokens


def _model_json(model: Served) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "shenhong",
        "max_model_len": model.context,
        "sampling_defaults": sampling_json(model.sampling),
    }


@router.get("/v1/models")
async def models(request: Request) -> Any:
    return {"object": "list", "data": [_model_json(m) for m in hub_of(request).models.values()]}


@router.get("/v1/models/{model}")
async def one_model(request: Request, model: str) -> Any:
    return _model_json(hub_of(request).model(model))


@router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeRequest) -> Any:
    hub = hub_of(request)
    hub.meter.request(owner_of(request))
    model = hub.model(body.model)
    tokenizer = model.llm.tokenizer
    if body.messages is not None:
        messages = plain_messages(model, hub.limits, body.messages)
        tokens, _ = await model.template.prompt(messages, None, body.add_generation_prompt)
    else:
        first = tokenizer.begin if body.add_special_tokens else []
        tokens = first + await asyncio.to_thread(tokenizer.encode, body.prompt or "")
    words = [tokenizer.backend.id_to_token(token) for token in tokens]
    return {
        "count": len(tokens),
        "max_model_len": model.context,
        "tokens": tokens,
        "token_strs": words if body.return_token_strs else None,
    }


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest) -> Any:
    hub = hub_of(request)
    hub.meter.request(owner_of(request))
    model = hub.model(body.model)
    for number, token in enumerate(body.tokens):
        if token >= len(model.bytes_of):
            raise bad(f"token {token} is outside of the vocabulary", f"tokens.{number}")
    return {"prompt": model.llm.tokenizer.decode(body.tokens)}
