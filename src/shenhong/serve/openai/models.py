"""/v1/models, /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from shenhong.serve.http.bodies import CheckedRoute, aside, size_of
from shenhong.serve.http.faults import bad
from shenhong.serve.hub import Served, hub_of, owner_of
from shenhong.serve.openai.messages import template_messages
from shenhong.serve.openai.schemas import DetokenizeRequest, TokenizeRequest
from shenhong.serve.sampling import sampling_json

router = APIRouter(route_class=CheckedRoute)


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
        messages = await aside(await size_of(request), template_messages, model, body.messages)
        tokens, _ = await model.template.prompt(messages, None, body.add_generation_prompt)
    else:
        first = tokenizer.begin if body.add_special_tokens else []
        text = body.prompt or ""
        tokens = first + await aside(len(text), tokenizer.encode, text)
    return await aside(len(tokens), _tokens_json, model, tokens, body.return_token_strs)


def _tokens_json(model: Served, tokens: list[int], with_words: bool) -> JSONResponse:
    """As it is: FastAPI would look at every token by itself."""
    word = model.llm.tokenizer.backend.id_to_token
    return JSONResponse(
        {
            "count": len(tokens),
            "max_model_len": model.context,
            "tokens": tokens,
            "token_strs": [word(token) for token in tokens] if with_words else None,
        }
    )


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest) -> Any:
    hub = hub_of(request)
    hub.meter.request(owner_of(request))
    model = hub.model(body.model)
    return {"prompt": await aside(len(body.tokens), _text_of, model, body.tokens)}


def _text_of(model: Served, tokens: list[int]) -> str:
    """Fault: 400 for a token that there is not."""
    for number, token in enumerate(tokens):
        if token >= len(model.bytes_of):
            raise bad(f"token {token} is outside of the vocabulary", f"tokens.{number}")
    return model.llm.tokenizer.decode(tokens)
