"""Log-probabilities of tokens in the shapes of the two older endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shenhong.engine.request import TokenLogprob
from shenhong.serve.generation import GenerationRequest
from shenhong.serve.hub import Served
from shenhong.serve.openai.schemas import CompletionRequest


def chat_logprobs(
    model: Served, generation: GenerationRequest, found: Sequence[TokenLogprob]
) -> dict | None:
    if generation.logprobs is None:
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
        | {"top_logprobs": [named(*pair) for pair in one.top[: generation.logprobs]]}
        for one in found
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
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


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # JSON has no infinity; OpenAI writes this number
