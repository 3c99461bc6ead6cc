"""Tools that a caller offers: which may be called, and the grammar that lets only fitting calls be written."""

from __future__ import annotations

import json
import re
from typing import Any

from shenhong.chat.tool_calls import PROBE_TOOL, Offer
from shenhong.chat.tool_formats import ToolFormat
from shenhong.engine.request import Constraint
from shenhong.serve.http.faults import bad
from shenhong.serve.hub import Served
from shenhong.serve.openai.constraints import checked_schema, sized
from shenhong.serve.openai.schemas import ChatRequest, Function, NamedChoice
from shenhong.serve.settings import Limits

# As `tojson` of a template writes, so that a forced call looks like those the model was trained on.
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
NO_ARGUMENTS: dict[str, Any] = PROBE_TOOL["function"]["parameters"]


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


def offer_of(model: Served, limits: Limits, body: ChatRequest) -> Offer | None:
    """What may be called. Fault: 400 for what the model's template cannot express."""
    functions = _offered(body)
    if not functions:
        return None
    tool_format = tool_format_of(model, "tools")
    for number, function in enumerate(functions):
        checked_schema(limits, function.parameters or {}, f"tools.{number}.function.parameters")
    return Offer(tool_format, functions)


def _offered(body: ChatRequest) -> list[Function]:
    """The functions that may be called: none with tool_choice none. Fault: 400 for a choice that is impossible."""
    functions = [tool.function for tool in body.tools or []]
    names = [function.name for function in functions]
    for number, function in enumerate(functions):
        where = f"tools.{number}.function"
        if function.name in names[:number]:
            raise bad(f"two tools are called {function.name}", f"{where}.name", "conflict")
        if (function.parameters or NO_ARGUMENTS).get("type", "object") != "object":
            raise bad("parameters of a function are of type object", f"{where}.parameters")
    choice = body.tool_choice
    if isinstance(choice, NamedChoice) and choice.function.name not in names:
        raise bad(f"no tool is called {choice.function.name}", "tool_choice", "unknown_tool")
    if choice == "required" and not functions:
        raise bad("tool_choice required needs tools", "tool_choice", "conflict")
    return [] if choice == "none" else functions


def calls_constraint(
    limits: Limits, offer: Offer | None, body: ChatRequest, thinking: bool
) -> Constraint | None:
    """The grammar of calls where the caller wants them forced or strict. Fault: 400 where it is too large."""
    found = offer and _grammar(offer, body, thinking)
    return sized(limits, found, "tools") if found else None


def _grammar(offer: Offer, body: ChatRequest, thinking: bool) -> Constraint | None:
    """Lets only calls through that fit their schemas, where the caller wants that.

    `required` and a named function are forced; with `auto` the grammar is needed for functions that are `strict`, and
    where only one call may come. `thinking`: the prompt ends inside of it, so a forced call comes behind it. Fault: 400
    for a format whose arguments are not JSON.
    """
    tool_format, functions = offer.tool_format, offer.functions
    choice, single = body.tool_choice, body.parallel_tool_calls is False
    forced = choice not in (None, "auto")
    if not forced and not single and not any(function.strict for function in functions):
        return None
    if tool_format.pair:
        param = "tool_choice" if forced else "parallel_tool_calls" if single else "tools"
        raise bad(
            "calls as this model's template writes them cannot be held to anything: leave tool_choice at auto, and "
            "strict and parallel_tool_calls out",
            param,
            "tools_unsupported",
        )
    if isinstance(choice, NamedChoice):
        functions = [f for f in functions if f.name == choice.function.name]
        single = True
    rules = [f"fn: {' | '.join(f'f{number}' for number in range(len(functions)))}"]
    for number, function in enumerate(functions):
        schema = function.parameters or NO_ARGUMENTS
        if not (forced or function.strict):
            schema = {}
        schema = {"type": "object", **schema, "x-guidance": SPACING}
        call = (
            _literal(tool_format.head % function.name),
            f"a{number}",
            _literal(tool_format.tails[0]),
        )
        rules.append(f"f{number}: {' '.join(call)}")
        rules.append(f"a{number}: %json {json.dumps(schema, ensure_ascii=False)}")
    rules += _around(tool_format, forced, single, thinking)
    return Constraint("grammar", "\n".join(rules) + "\n")


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _around(tool_format: ToolFormat, forced: bool, single: bool, thinking: bool) -> list[str]:
    """Rules of what may stand before, between and behind calls."""
    more = "" if single or tool_format.more is None else f"({_literal(tool_format.more)} fn)*"
    calls = f"calls: {_literal(tool_format.opened)} fn {more} {_literal(tool_format.closed)}"
    if forced:
        thought = ["thought[lazy]: /(.|\\n)*<\\/think>/", "WHITE: /\\s{0,2}/"] if thinking else []
        before = "thought WHITE " if thinking else ""
        return [f"start: {before}{_literal(tool_format.mark)} calls", calls, *thought]
    if not tool_format.mark:
        return ["start: calls | TEXT", calls, "TEXT: /\\s*([^{\\s](.|\\n)*)?/"]
    mark = re.escape(tool_format.mark)
    return [
        f"start: (head calls){'?' if single else '*'} TAIL",
        f"head[lazy]: /(.|\\n)*{mark}/",
        f"TAIL: /(.|\\n)*/ & ~/(.|\\n)*{mark}(.|\\n)*/",
        calls,
    ]
