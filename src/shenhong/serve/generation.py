"""From what a caller asks for to requests of the engine."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from shenhong.chat.tool_calls import Offer
from shenhong.engine import Sampling, request_seed
from shenhong.engine.request import Constraint, Request
from shenhong.errors import RequestError
from shenhong.serve.engine_thread import Stream
from shenhong.serve.http.faults import Fault, bad, stopping
from shenhong.serve.http.fields import SamplingFields
from shenhong.serve.hub import Hub, Served
from shenhong.serve.settings import Limits


class FieldNames(NamedTuple):
    """What the caller's API calls these fields, so that an error can name them."""

    prompt: str = "messages"
    max_tokens: str = "max_tokens"
    response_format: str = "response_format"
    n: str = "n"


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt, what is to follow it, and how the answer is to be read.

    `thinking`: whether the prompt ends inside of thinking; None: thinking is left in the text. `offer`: the tools that
    may be called. `first`: the number of the first answer, where one call has several prompts.
    """

    prompt: list[int]
    sampling: SamplingFields
    max_tokens: int | None = None
    n: int = 1
    logprobs: int | None = None
    constraint: Constraint | None = None
    thinking: bool | None = None
    offer: Offer | None = None
    first: int = 0
    names: FieldNames = field(default_factory=FieldNames)


async def start(
    hub: Hub, model: Served, owner: str, generations: Sequence[GenerationRequest]
) -> list[Stream]:
    """Queue everything that one call asks for. Errors: Fault, RequestError."""
    if hub.draining:
        raise stopping()
    limits, names = hub.limits, generations[0].names
    check_count(limits, sum(generation.n for generation in generations), names.n)
    seed = generations[0].sampling.seed
    base = secrets.randbits(48) if seed is None else seed
    requests: list[Request] = []
    for generation in generations:
        requests += _engine_requests(model, limits, owner, generation, base)
    prompt_tokens = sum(len(generation.prompt) for generation in generations)
    hub.meter.prompt(owner, prompt_tokens)

    def pay(stream: Stream) -> None:
        hub.meter.written(owner, stream.written)
        hub.counts["answers", model.id] += 1

    try:
        return await model.thread.submit(requests, pay)
    except (Fault, RequestError) as error:
        hub.meter.written(owner, -prompt_tokens)  # nothing was read, so nothing is paid
        if isinstance(error, Fault) and error.code == "constraint":
            error.param = names.response_format
        raise


def check_count(limits: Limits, answers: int, param: str) -> None:
    """Fault: 400 where one call asks for more answers than may be queued."""
    most = min(limits.max_n, limits.max_queue)
    if answers > most:
        raise bad(f"more than {most} answers are asked for", param, "too_many")


def check_prompt(model: Served, limits: Limits, tokens: int, param: str) -> None:
    """Fault: 400 for a prompt without tokens, or longer than the model or the limits allow."""
    most = min(model.context, limits.max_prompt_tokens)
    if not tokens:
        raise bad("the prompt is empty", param, "empty_prompt")
    if tokens > most:
        raise bad(
            f"the prompt has {tokens} tokens; {model.id} reads at most {most}",
            param,
            "context_length_exceeded",
        )


def _engine_requests(
    model: Served, limits: Limits, owner: str, generation: GenerationRequest, seed: int
) -> list[Request]:
    names = generation.names
    check_prompt(model, limits, len(generation.prompt), names.prompt)
    max_tokens, most = generation.max_tokens, limits.max_output_tokens
    if max_tokens is not None and max_tokens > most:
        raise bad(
            f"{names.max_tokens} is {max_tokens}; at most {most} are written",
            names.max_tokens,
            "too_many_tokens",
        )
    given = generation.sampling
    stop = (given.stop,) if isinstance(given.stop, str) else tuple(given.stop or ())
    sampling = _sampling(model, given)
    if any(not text for text in stop):
        raise bad("an empty stop string would stop at once", "stop", "invalid_value")
    return [
        Request(
            prompt=tuple(generation.prompt),
            max_new_tokens=max_tokens or most,
            sampling=sampling,
            seed=request_seed(seed, generation.first + number),
            stop=stop,
            logprobs=generation.logprobs,
            constraint=generation.constraint,
            owner=owner,
        )
        for number in range(generation.n)
    ]


def _sampling(model: Served, given: SamplingFields) -> Sampling:
    """The model's own defaults, with what the caller sets in their place. Fault: 400."""
    named = {
        name: value
        for name in Sampling.__dataclass_fields__
        if name != "logit_bias" and (value := getattr(given, name)) is not None
    }
    bias = {int(token): value for token, value in (given.logit_bias or {}).items()}
    if beyond := [token for token in bias if token >= len(model.bytes_of)]:
        raise bad(f"token {beyond[0]} is outside of the vocabulary", "logit_bias", "invalid_value")
    return Sampling(**(vars(model.sampling) | named | {"logit_bias": bias}))
