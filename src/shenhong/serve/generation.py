"""From what a caller asked for to requests of the engine, and from its events to the parts of an answer."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shenhong.chat.thinking import Thinking, Thoughts
from shenhong.chat.tool_calls import Call, Calls, Offer, joined
from shenhong.chat.tool_formats import ToolFormat
from shenhong.engine import Sampling, request_seed
from shenhong.engine.request import Constraint, Request, TokenLogprob, Usage
from shenhong.errors import RequestError
from shenhong.serve.engine_thread import Stream
from shenhong.serve.http.faults import Fault, bad, stopping
from shenhong.serve.http.limits import MOST_MULTIPLE, depth_of_value, multiples_fit
from shenhong.serve.hub import Hub, Served
from shenhong.serve.openai.schemas import (
    ChatMessage,
    ChatRequest,
    Drawing,
    ResponseFormat,
    StructuredOutputs,
    TextFormat,
    TextPart,
    ToolCall,
)
from shenhong.serve.openai.tools import constraint, offered
from shenhong.serve.settings import Limits

NOTHING = Usage(0, 0, 0)


class Fields(NamedTuple):
    """What the caller's request calls these, for errors that name them."""

    prompt: str = "messages"
    tokens: str = "max_tokens"
    form: str = "response_format"
    several: str = "n"


@dataclass(frozen=True)
class Ask:
    """One prompt and what shall follow it, and how that is read.

    `thinking`: whether the prompt ends inside of thinking; None: thinking is left in the text. `offer`: the tools.
    """

    prompt: list[int]
    how: Drawing
    max_tokens: int | None = None
    n: int = 1
    logprobs: int | None = None
    constraint: Constraint | None = None
    thinking: bool | None = None
    offer: Offer | None = None
    first: int = 0  # number of the first answer, where one call has several prompts
    fields: Fields = field(default_factory=Fields)


async def begin(hub: Hub, model: Served, owner: str, asks: Sequence[Ask]) -> list[Stream]:
    """Queue everything a call asks for. Errors: Fault, RequestError."""
    if hub.draining:
        raise stopping()
    limits, fields = hub.limits, asks[0].fields
    most = min(limits.max_n, limits.max_queue)
    if sum(ask.n for ask in asks) > most:
        raise bad(f"more than {most} answers are asked for", fields.several, "too_many")
    seed = asks[0].how.seed
    base = secrets.randbits(48) if seed is None else seed
    requests: list[Request] = []
    for ask in asks:
        requests += _requests(model, limits, owner, ask, base)
    read = sum(len(ask.prompt) for ask in asks)
    hub.meter.prompt(owner, read)

    def pay(stream: Stream) -> None:
        hub.meter.written(owner, stream.written)
        hub.counts["answers", model.id] += 1

    try:
        return await model.thread.submit(requests, pay)
    except (Fault, RequestError) as error:
        hub.meter.written(owner, -read)  # nothing was read, so nothing is paid
        if isinstance(error, Fault) and error.code == "constraint":
            error.param = fields.form
        raise


def check_prompt(model: Served, limits: Limits, tokens: int, param: str) -> None:
    """Fault: 400 for a prompt that says nothing, or leaves no room for an answer."""
    most = min(model.context, limits.max_prompt_tokens)
    if not tokens:
        raise bad("the prompt is empty", param, "empty_prompt")
    if tokens > most:
        raise bad(
            f"the prompt has {tokens} tokens; {model.id} reads at most {most}",
            param,
            "context_length_exceeded",
        )


def _requests(model: Served, limits: Limits, owner: str, ask: Ask, seed: int) -> list[Request]:
    check_prompt(model, limits, len(ask.prompt), ask.fields.prompt)
    if ask.max_tokens is not None and ask.max_tokens > limits.max_output_tokens:
        name, most = ask.fields.tokens, limits.max_output_tokens
        raise bad(
            f"{name} is {ask.max_tokens}; at most {most} are written", name, "too_many_tokens"
        )
    how = ask.how
    named = {
        name: value
        for name in Sampling.__dataclass_fields__
        if name != "logit_bias" and (value := getattr(how, name)) is not None
    }
    bias = {int(token): value for token, value in (how.logit_bias or {}).items()}
    if beyond := [token for token in bias if token >= len(model.bytes_of)]:
        raise bad(f"token {beyond[0]} is outside of the vocabulary", "logit_bias", "invalid_value")
    stop = (how.stop,) if isinstance(how.stop, str) else tuple(how.stop or ())
    if any(not text for text in stop):
        raise bad("an empty stop string would stop at once", "stop", "invalid_value")
    sampling = Sampling(**(vars(model.sampling) | named | {"logit_bias": bias}))
    return [
        Request(
            prompt=tuple(ask.prompt),
            max_new_tokens=ask.max_tokens or limits.max_output_tokens,
            sampling=sampling,
            seed=request_seed(seed, ask.first + number),
            stop=stop,
            logprobs=ask.logprobs,
            constraint=ask.constraint,
            owner=owner,
        )
        for number in range(ask.n)
    ]


# ------------------------------------------------------------------------ what is asked for


def constraint_of(
    limits: Limits,
    form: ResponseFormat | TextFormat | None,
    outputs: StructuredOutputs | None,
) -> Constraint | None:
    """Fault: 400 where a schema is too large or both ways are used."""
    if form is not None and form.type != "text" and outputs is not None:
        raise bad(
            "give either response_format or structured_outputs", "structured_outputs", "conflict"
        )
    if outputs is not None:
        if outputs.regex is not None:
            return _sized(limits, Constraint("regex", outputs.regex), "structured_outputs")
        if outputs.choice is not None:
            choices = json.dumps(outputs.choice, ensure_ascii=False)
            return _sized(limits, Constraint("choice", choices), "structured_outputs")
        return _schema(limits, outputs.json_schema or {}, "structured_outputs")
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return Constraint("json", '{"type": "object"}')
    named = form.json_schema if isinstance(form, ResponseFormat) else form
    assert named is not None
    param = "response_format" if isinstance(form, ResponseFormat) else "text"
    return _schema(limits, named.schema_ or {"type": "object"}, param)


def _schema(limits: Limits, schema: dict[str, Any], param: str) -> Constraint:
    if depth_of_value(schema) > limits.max_schema_depth:
        raise bad(
            f"the schema nests deeper than {limits.max_schema_depth} levels", param, "schema_depth"
        )
    if not multiples_fit(schema):
        raise bad(
            f"the least common multiple of the schema's multipleOf is over {MOST_MULTIPLE}",
            param,
            "schema_multiple",
        )
    return _sized(limits, Constraint("json", json.dumps(schema, ensure_ascii=False)), param)


def _sized(limits: Limits, constraint: Constraint, param: str) -> Constraint:
    if len(constraint.value.encode("utf-8", "surrogatepass")) > limits.max_schema_bytes:
        raise bad(
            f"what may be written is described in over {limits.max_schema_bytes} bytes",
            param,
            "schema_size",
        )
    return constraint


def text_of_content(content: str | list[TextPart] | None) -> str:
    return content if isinstance(content, str) else "".join(p.text for p in content or [])


def plain_messages(model: Served, limits: Limits, messages: list[ChatMessage]) -> list[dict]:
    """As the template reads them. Fault: 400 for what it cannot express."""
    if len(messages) > limits.max_messages:
        raise bad(f"more than {limits.max_messages} messages", "messages", "too_many")
    plain = []
    called: dict[str, str] = {}  # names of functions by the ids of their calls
    for number, message in enumerate(messages):
        where = f"messages.{number}"
        said: dict[str, Any] = {
            "role": "system" if message.role == "developer" else message.role,
            "content": text_of_content(message.content),
        }
        if message.reasoning_content is not None:
            said["reasoning_content"] = thought_before(model, message.reasoning_content, where)
        if message.role == "tool" or message.tool_calls or message.tool_call_id:
            tool_format_of(model, where)
        if message.tool_calls:
            if message.role != "assistant":
                raise bad("only the assistant calls tools", f"{where}.tool_calls")
            said["tool_calls"] = [
                _called(model, call, f"{where}.tool_calls.{n}")
                for n, call in enumerate(message.tool_calls)
            ]
            called |= {call.id: call.function.name for call in message.tool_calls}
        if message.role == "tool":
            if message.tool_call_id not in called:
                raise bad("it answers no call made before it", f"{where}.tool_call_id")
            name = message.name or called[message.tool_call_id]
            said |= {"tool_call_id": message.tool_call_id, "name": name}
        elif message.tool_call_id:
            raise bad("only tools answer calls", f"{where}.tool_call_id")
        plain.append(said)
    return plain


def thought_before(model: Served, thought: str, where: str) -> str:
    """Earlier thinking. Fault: 400 where the template has none."""
    if not model.template.thinking:
        raise bad(f"the template of {model.id} has no thinking", f"{where}.reasoning_content")
    return thought


def _called(model: Served, call: ToolCall, where: str) -> dict[str, Any]:
    """As the template wants it: the arguments are an object in most, text in some. Fault: 400."""
    text = call.function.arguments or "{}"
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise bad("arguments are a JSON object as text", f"{where}.function.arguments")
    said = text if model.template.calls_in_text else arguments
    return call.model_dump() | {"function": {"name": call.function.name, "arguments": said}}


def tool_format_of(model: Served, param: str) -> ToolFormat:
    """Fault: 400 where the model's template has no tools."""
    if (found := model.template.tool_format) is None:
        why = (
            "calls of its template are not read"
            if model.template.tools
            else "its template has none"
        )
        raise bad(f"no tools with {model.id}: {why}; leave them out", param, "tools_unsupported")
    return found


def tools_of(model: Served, limits: Limits, body: ChatRequest) -> Offer | None:
    """What may be called. Fault: 400 where that is nothing the model's template can say."""
    functions = offered(body)
    if not functions:
        return None
    tool_format = tool_format_of(model, "tools")
    for number, function in enumerate(functions):
        _schema(limits, function.parameters or {}, f"tools.{number}.function.parameters")
    return Offer(tool_format, functions)


def calls_constraint(
    limits: Limits, offer: Offer | None, body: ChatRequest, thinking: bool
) -> Constraint | None:
    """The grammar of calls where the caller wants them forced or strict. Fault: 400 where it is too large."""
    found = offer and constraint(offer, body, thinking)
    return _sized(limits, found, "tools") if found else None


def template_variables(model: Served, given: dict[str, Any] | None) -> dict[str, Any]:
    """chat_template_kwargs: only what the template asks about. Fault: 400."""
    from shenhong.chat.template import OURS

    allowed = model.template.variables - OURS - {"raise_exception", "strftime_now"}
    for name in given or {}:
        if name not in allowed:
            raise bad(
                f"the chat template of {model.id} knows no {name}",
                "chat_template_kwargs",
                "unknown_field",
            )
    return given or {}


# ------------------------------------------------------------------------ what is answered


class Piece(NamedTuple):
    """Something new of one answer."""

    said: list[tuple[str, str]]  # ("text" or "reasoning", what)
    calls: list[Call]  # what is new of them
    thought: int  # how many tokens of it are thinking
    logprobs: list[TokenLogprob]
    finish: str | None
    usage: Usage | None


async def pieces(model: Served, stream: Stream, ask: Ask) -> AsyncGenerator[Piece, None]:
    """One answer as it comes; what came while the reader was busy is one piece. Errors: Fault."""
    thinks, inside = model.template.thinking and ask.thinking is not None, bool(ask.thinking)
    cut, thoughts = Thinking(thinks, inside), Thoughts(model.bytes_of, thinks, inside)
    taken = Calls(ask.offer) if ask.offer else None
    called = False
    async for events in stream:
        text = "".join(event.text for event in events)
        finish: str | None = events[-1].finish if events else None
        if finish == "error" and stream.request.constraint is not None:  # too hard to follow
            raise bad(events[-1].error or "the constraint failed", ask.fields.form, "constraint")
        if finish == "error":
            raise Fault(500, events[-1].error or "the engine failed", code="engine_error")
        said = cut.feed(text, last=finish is not None)
        calls: list[Call] = []
        if taken is not None:
            said, calls = _without_calls(taken, said, finish is not None)
            called = called or bool(calls)
        yield Piece(
            said,
            calls,
            thoughts.among(token for event in events for token in event.tokens),
            [logprob for event in events for logprob in event.logprobs],
            "tool_calls" if called and finish == "stop" else finish,
            events[-1].usage if events else None,
        )


def _without_calls(
    taken: Calls, said: list[tuple[str, str]], last: bool
) -> tuple[list[tuple[str, str]], list[Call]]:
    """Calls stand in the text, never in thinking."""
    rest = [part for part in said if part[0] != "text"]
    text, calls = taken.feed("".join(text for part, text in said if part == "text"), last)
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

    def add(self, piece: Piece) -> None:
        for part, text in piece.said:
            if part == "text":
                self.text += text
            else:
                self.reasoning += text
        self.calls = joined(self.calls, piece.calls)
        self.thought += piece.thought
        self.logprobs += piece.logprobs
        self.finish = piece.finish or self.finish
        self.usage = piece.usage or self.usage


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
