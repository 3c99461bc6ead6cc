"""Tools: what a model's template makes of them, which texts are calls, and the grammar that lets nothing else be written.

Two forms of calls are read, told apart by what the template itself writes:
    tagged (Hermes, Qwen)   <tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>, any number, text around them
    bare (Llama)            {"name": …, "parameters": {…}} as the whole answer
A call of an unknown function, or one that is no JSON, is text: nothing that was written is lost.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from shenhong.engine.request import Constraint
from shenhong.serve.faults import bad
from shenhong.serve.schemas import ChatRequest, Function, NamedChoice
from shenhong.serve.store import new_id

# As `tojson` of a template writes, so that a forced call looks like those the model was trained on.
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
STRINGS = re.compile(r'"(?:[^"\\]|\\.)*+"', re.DOTALL)
NO_ARGUMENTS: dict[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Form:
    """How calls stand in a text. `key`: the name of the arguments. No tags: a call is the whole text."""

    opened: str
    closed: str
    key: str


TAGGED = Form("<tool_call>", "</tool_call>", "arguments")
BARE = Form("", "", "parameters")


# What a template is shown to see how it writes: an answer in words, and one that is a call.
PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "f", "description": "f", "parameters": NO_ARGUMENTS},
}
PROBE_CALL = {
    "id": "123456789",  # some templates want nine signs
    "type": "function",
    "function": {"name": "f", "arguments": {"x": "y"}},
}
PROBE_WORDS = "in words"


def probe(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """A conversation that ends with an answer."""
    return [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""} | answer]


PROBES = probe({"content": PROBE_WORDS}), probe({"tool_calls": [PROBE_CALL]})


def form_of(worded: str, called: str) -> Form | None:
    """The form of calls, from what a template made of `PROBES`; None where it is none that is read here."""
    tagged, bare = (f'{{"name": "f", "{form.key}": {{"x": "y"}}}}' for form in (TAGGED, BARE))
    if f"{TAGGED.opened}\n{tagged}\n{TAGGED.closed}" in called:
        return TAGGED
    return BARE if called.strip() == worded.replace(PROBE_WORDS, bare).strip() else None


class Call(NamedTuple):
    """One call; `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str

    def json(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class Offer:
    """The functions a model may call in one answer, and how it writes that."""

    form: Form
    functions: list[Function]


class Calls:
    """Takes calls out of text that comes in pieces; what may become a call is held back."""

    def __init__(self, offer: Offer) -> None:
        self.form, self.names = offer.form, {function.name for function in offer.functions}
        self._held = ""
        self._begun = False  # white space at the beginning and behind a call is dropped
        self._only_text = False

    def feed(self, text: str, last: bool = False) -> tuple[str, list[Call]]:
        """The text and the calls that are certain now."""
        text, self._held = self._held + text, ""
        if not self.form.opened:
            return self._bare(text, last)
        opened, closed = self.form.opened, self.form.closed
        said, calls = "", list[Call]()
        while opened in text:
            before, _, after = text.partition(opened)
            said += self._say(before)
            inside, found, text = after.partition(closed)
            while found and '"' in STRINGS.sub("", inside):  # the tag is part of an argument
                more, found, text = text.partition(closed)
                inside += closed + more
            if not found and not last:
                self._held = opened + after
                return said, calls
            if call := self._read(inside):
                calls.append(call)
                self._begun = False
            else:
                said += self._say(opened + inside + found)
        sure = len(text) - (0 if last else may_begin(text, opened))
        self._held = text[sure:]
        return said + self._say(text[:sure]), calls

    def _bare(self, text: str, last: bool) -> tuple[str, list[Call]]:
        begins = text.lstrip()[:1]
        self._only_text = self._only_text or begins not in ("", "{")
        if not (self._only_text or last):
            self._held = text
            return "", []
        call = None if self._only_text else self._read(text)
        return ("", [call]) if call else (self._say(text), [])

    def _say(self, text: str) -> str:
        text = text if self._begun else text.lstrip()
        self._begun = self._begun or bool(text)
        return text

    def _read(self, text: str) -> Call | None:
        try:
            match json.loads(text):
                case {"name": str(name), self.form.key: dict(arguments)}:
                    written = json.dumps(arguments, ensure_ascii=False)
                case _:
                    return None
        except (ValueError, RecursionError):
            return None
        return Call(f"call_{new_id()}", name, written) if name in self.names else None


def may_begin(text: str, tag: str) -> int:
    """How many of the last characters may be the beginning of a tag that is still coming."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)


# ------------------------------------------------------------------------ what is asked for


def offered(body: ChatRequest) -> list[Function]:
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


def constraint(offer: Offer, body: ChatRequest, thinking: bool) -> Constraint | None:
    """Lets only calls through that fit their schemas, where the caller wants that.

    `required` and a named function are forced; with `auto` the grammar is needed for functions that are `strict`, and
    where only one call may come. `thinking`: the prompt ends inside of it, so a forced call comes behind it.
    """
    form, functions = offer.form, offer.functions
    choice, single = body.tool_choice, body.parallel_tool_calls is False
    forced = choice not in (None, "auto")
    if not forced and not single and not any(function.strict for function in functions):
        return None
    if isinstance(choice, NamedChoice):
        functions = [f for f in functions if f.name == choice.function.name]
        single = True
    rules = [f"fn: {' | '.join(f'f{number}' for number in range(len(functions)))}"]
    for number, function in enumerate(functions):
        schema = function.parameters or NO_ARGUMENTS
        if not (forced or function.strict):
            schema = {}
        schema = {"type": "object", **schema, "x-guidance": SPACING}
        head = json.dumps(f'{{"name": "{function.name}", "{form.key}": ')
        rules.append(f'f{number}: {head} a{number} "}}"')
        rules.append(f"a{number}: %json {json.dumps(schema, ensure_ascii=False)}")
    rules += _around(form, forced, single, thinking)
    return Constraint("grammar", "\n".join(rules) + "\n")


def _around(form: Form, forced: bool, single: bool, thinking: bool) -> list[str]:
    """Rules of what may stand before, between and behind calls."""
    opened, closed = form.opened, form.closed
    call = f'call: "\\n" fn "\\n{closed}"'
    if forced:
        thought = ["thought[lazy]: /(.|\\n)*<\\/think>/", "WHITE: /\\s{0,2}/"] if thinking else []
        before = "thought WHITE " if thinking else ""
        if not opened:
            return [f"start: {before}fn", *thought]
        more = "" if single else f' ("\\n{opened}" call)*'
        return [f'start: {before}"{opened}" call{more}', call, *thought]
    if not opened:
        return ["start: fn | TEXT", "TEXT: /\\s*([^{\\s](.|\\n)*)?/"]
    return [
        f"start: (head call){'?' if single else '*'} TAIL",
        f"head[lazy]: /(.|\\n)*{opened}/",
        f"TAIL: /(.|\\n)*/ & ~/(.|\\n)*{opened}(.|\\n)*/",
        call,
    ]
