"""Calls of tools: which format a template writes them in, and how they are read as they come.

A call starts once the name of an offered function and the opening bracket of its arguments are certain. What may still
become a call is held back, and what cannot is text, so nothing that was written is lost. The arguments are
then passed on as the model writes them. Without a grammar (`tools`) they may be broken or cut, as OpenAI's may: the
call keeps what was written of them, and whatever follows that does not end a call is text again.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from shenhong.chat.thinking import may_begin
from shenhong.chat.tool_formats import ToolFormat, tool_formats
from shenhong.chat.tool_formats.base import ID, NINE

# What a template is shown to see how it writes: an answer in words, and one that is a call.
PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "f",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
}
PROBE_WORDS, PROBE_TEXT = "in words", '{"x": "y"}'


def probes(arguments: dict[str, str] | str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The two conversations. Most templates want arguments as an object and some as text."""
    function = {"name": "f", "arguments": arguments}
    call = {"id": NINE, "type": "function", "function": function}
    answers: tuple[dict[str, Any], ...] = {"content": PROBE_WORDS}, {"tool_calls": [call]}
    worded, called = (
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""} | answer]
        for answer in answers
    )
    return worded, called


def format_of(worded: str, called: str) -> ToolFormat | None:
    """The format of calls, from what a template made of the probes; None if it is not one of ours.

    Templates are careless of white space, so a format that differs in nothing else is taken if none agrees exactly.
    """
    for read in (str, squeezed):
        answer, written = read(worded), read(called)
        for tool_format in tool_formats():
            for tail in range(len(tool_format.tails)):
                call = read(tool_format.call("f", PROBE_TEXT, tail))
                whole = answer.replace(read(PROBE_WORDS), call).strip() == written.strip()
                if whole or (tool_format.mark and call in written):
                    return tool_format
    return None


def squeezed(text: str) -> str:
    return "".join(text.split())


class Call(NamedTuple):
    """One call, or something new of it: it begins with id and name, more of its arguments comes without them."""

    id: str
    name: str
    arguments: str

    def json(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        if not self.name:
            return {"function": {"arguments": self.arguments}}
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


def new_call_id() -> str:
    """Nine letters and digits: Mistral's templates take no others."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


def joined(calls: Sequence[Call], news: Iterable[Call]) -> list[Call]:
    """Calls with what is new of them."""
    whole = list(calls)
    for new in news:
        if new.name:
            whole.append(new)
        else:
            whole[-1] = whole[-1]._replace(arguments=whole[-1].arguments + new.arguments)
    return whole


class Function(Protocol):
    """A function that may be called; ``parameters`` is a JSON schema, ``strict`` that calls must fit it."""

    @property
    def name(self) -> str: ...

    @property
    def parameters(self) -> dict[str, Any] | None: ...

    @property
    def strict(self) -> bool | None: ...


@dataclass(frozen=True)
class Offer:
    """The functions a model may call in one answer, and how it writes that."""

    tool_format: ToolFormat
    functions: Sequence[Function]


# ------------------------------------------------------------------------ reading

COMING = -1  # what is wanted may still come
WORD, WHITE = re.compile(r"[\w-]*"), re.compile(r"\s*")
Wanted = tuple[str, list[str], list[str]]  # a name, its signs, and signs that must follow
OUTSIDE_STRINGS = frozenset(" \t\r\n:,+-.0123456789Eaeflnrstu")  # in JSON, beside brackets


def signs(text: str) -> list[str]:
    """Words and single signs, without white space."""
    return re.findall(r"[\w-]+|[^\w\s]", text)


def behind(text: str, wanted: Sequence[str], at: int = 0) -> int | None:
    """The place in text behind these signs, which stand at `at`; None: it says something else."""
    for sign in wanted:
        at = WHITE.match(text, at).end()  # type: ignore[union-attr]
        found = WORD.match(text, at) if sign == ID else None
        sign = found[0] if found else sign
        if not text.startswith(sign, at):
            return COMING if sign.startswith(text[at : at + len(sign)]) else None
        at += len(sign)
    return at


def pair_of(*around: str) -> re.Pattern[str]:
    """Finds an argument; line breaks around it may be missing."""
    before, between, end = (re.escape(part).replace("\\\n", "\n?") for part in around)
    return re.compile(f"{before}([^<>]*){between}(.*?){end}", re.DOTALL)


def value_of(text: str, schema: Any) -> str:
    """A value as JSON. These formats write strings as they are and all else as JSON; the schema says which it is."""
    known = schema if isinstance(schema, dict) else {}
    one_of = known.get("enum")
    if known.get("type") != "string" and not (isinstance(one_of, list) and text in one_of):
        try:
            json.loads(text, parse_constant=not_json)
            return text
        except (ValueError, RecursionError):
            pass
    return json.dumps(text, ensure_ascii=False)


def not_json(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


class Calls:
    """Takes calls out of text that comes in deltas. White space before and behind calls and texts is dropped."""

    def __init__(self, offer: Offer) -> None:
        tool_format = self.format = offer.tool_format
        self._schemas = {function.name: function.parameters or {} for function in offer.functions}
        self._lead = signs(tool_format.mark + tool_format.opened + tool_format.head.split("%s")[0])
        self._first = self._heads(tool_format.mark + tool_format.opened)
        self._tails: list[Wanted] = [("", signs(tail), []) for tail in tool_format.tails]
        self._next: list[Wanted] = [("", signs(tool_format.closed), [])]
        if tool_format.more is not None:
            self._next += self._heads(tool_format.more)
        self._pair = tool_format.pair and pair_of(*tool_format.pair)
        self._name, self._first_pair = "", True  # of the call that is read
        self._rest = ""  # what is not emitted yet
        self._last = False
        self._reader: Callable[[], bool] = self._text
        self._started = False  # a text
        self._depth, self._quoted, self._escaped = 0, False, False  # in arguments
        self._delta, self._news = "", list[Call]()

    def _heads(self, before: str) -> list[Wanted]:
        pair, (tail, *_) = self.format.pair, self.format.tails
        return [
            (name, signs(before + self.format.head % name), signs(begin))
            for name in self._schemas
            for begin in ((pair[0], tail) if pair else ("{",))
        ]

    def feed(self, text: str, last: bool = False) -> tuple[str, list[Call]]:
        """What is certain now: text, and calls or more of the last one."""
        self._rest, self._last = self._rest + text, last
        self._delta, self._news = "", []
        while self._reader():
            pass
        return self._delta, self._news

    # Each reader takes what is certain off the rest; True: another one goes on.

    def _text(self) -> bool:
        mark, rest = self.format.mark, self._rest
        at = rest.find(mark) if mark or not self._started else -1
        if at < 0:
            sure = len(rest) if self._last or not mark else len(rest) - may_begin(rest, mark)
            self._emit_text(sure if self._last or not mark else len(rest[:sure].rstrip()))
            return False
        before = len(rest[:at].rstrip())
        led = behind(rest, self._lead, at) is not None  # before each name is looked at
        name, end = self._which(rest, self._first, at) if led else ("", None)
        if end == COMING and not self._last:
            self._emit_text(before)
            return False
        if end is None or end == COMING:
            self._emit_text(at + len(mark) if mark else len(rest))
            return bool(mark)
        self._emit_text(before)
        return self._start_call(name, end - before)

    def _arguments(self) -> bool:
        for at, char in enumerate(self._rest):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = char == "\\", char != '"'
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if not self._depth:
                    return self._more(at + 1, self._tail)
            elif char not in OUTSIDE_STRINGS:
                return self._more(at, self._tail)
        self._more(len(self._rest), self._arguments)
        return False

    def _pairs(self) -> bool:
        assert self._pair and self.format.pair
        self._rest = self._rest.lstrip()
        over = self.format.pair[2].strip() in self._rest  # a long value is looked through once
        if over and (found := self._pair.match(self._rest)):
            properties = self._schemas[self._name].get("properties")
            schema = properties.get(found[1]) if isinstance(properties, dict) else None
            key = json.dumps(found[1], ensure_ascii=False)
            self._emit(f"{'{' if self._first_pair else ', '}{key}: {value_of(found[2], schema)}")
            self._rest, self._first_pair = self._rest[found.end() :], False
            return True
        _, end = self._which(self._rest, self._tails)
        opened = behind(self._rest, signs(self.format.pair[0])) is not None
        if opened and not self._last:
            return False
        if end == COMING:
            return self._wait()
        if end is not None:
            self._emit("{}" if self._first_pair else "}")
        self._reader = self._text if end is None else self._tail  # text: it is broken or cut
        return True

    def _tail(self) -> bool:
        _, end = self._which(self._rest, self._tails)
        if end == COMING:
            return self._wait()
        self._rest = self._rest[end or 0 :]
        self._reader = self._text if end is None else self._behind
        return True

    def _behind(self) -> bool:
        """The end of all calls or another one."""
        name, end = self._which(self._rest, self._next)
        if end == COMING:
            return self._wait()
        if name and end is not None:
            return self._start_call(name, end)
        self._rest = self._rest[end or 0 :]
        self._reader = self._text
        return True

    # What readers do.

    def _which(self, text: str, wanted: Iterable[Wanted], at: int = 0) -> tuple[str, int | None]:
        """Which of the signs stand there, and where they end."""
        coming = False
        for name, those, following in wanted:
            end = behind(text, those + following, at)
            if end is not None and end != COMING:
                return name, behind(text, those, at)
            coming = coming or end == COMING
        return "", COMING if coming else None

    def _wait(self) -> bool:
        if self._last:  # an end that was cut
            self._rest = ""
        return False

    def _start_call(self, name: str, end: int) -> bool:
        self._news.append(Call(new_call_id(), name, ""))
        self._rest = self._rest[end:].lstrip()
        self._depth, self._quoted, self._escaped = 0, False, False
        self._name, self._first_pair = name, True
        self._started, self._reader = False, self._pairs if self._pair else self._arguments
        return True

    def _emit(self, arguments: str) -> None:
        self._news.append(Call("", "", arguments))

    def _more(self, end: int, reader: Callable[[], bool]) -> bool:
        if end:
            self._emit(self._rest[:end])
        self._rest, self._reader = self._rest[end:], reader
        return True

    def _emit_text(self, end: int) -> None:
        text, self._rest = self._rest[:end], self._rest[end:]
        text = text if self._started else text.lstrip()
        self._started = self._started or bool(text)
        self._delta += text
