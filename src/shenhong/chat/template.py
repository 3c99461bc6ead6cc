"""A model's own chat template: from messages to the tokens of its prompt.

The template comes with the model and the messages from a caller, so neither is trusted: `sandbox` renders, this asks.
The template reads messages as they were sent, and its text becomes tokens as the library makes them of it. What callers
write can never become a special token: where their text holds anything of a name of one, the names that the template
itself writes are rendered with a mark in them, and only those are tokens.
"""

from __future__ import annotations

import asyncio
import json
import re
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from shenhong.chat import sandbox
from shenhong.chat.tool_calls import PROBE_TEXT, PROBE_TOOL, PROBE_WORDS, format_of, probes
from shenhong.chat.tool_formats import ToolFormat
from shenhong.errors import RequestError, ServeError
from shenhong.tokenizer import Tokenizer
from shenhong.tokenizer.normalise import normalise
from shenhong.tokenizer.tokenizer import NEVER

P = ParamSpec("P")
R = TypeVar("R")

AT_ONCE = 8  # renderings
LONG = 10_000  # characters
START_SECONDS = 10.0
SECONDS = 2.0  # one rendering may take by default
# Of a model that was never tuned to talk: it goes on with the bare text.
CONTINUE = "{{ messages | map(attribute='content') | join('\n') }}"
OURS = {
    "messages",
    "add_generation_prompt",
    "bos_token",
    "eos_token",
    "pad_token",
    "tools",
}


class Template:
    """The template that came with a tokenizer. Use as a context manager, or `close` it. Errors: ServeError when the template cannot be used at all."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, seconds: float) -> None:
        template = tokenizer.special.template
        self.source = CONTINUE if template is None else template
        self.tokenizer, self.seconds = tokenizer, seconds
        self._folder = tempfile.TemporaryDirectory(prefix="shenhong-")
        self._address = str(Path(self._folder.name) / "template")
        names = tokenizer.names
        starts = (f"{re.escape(n[0])}(?={re.escape(n[1:2])}|\\Z)" for n in names)
        begins = "|".join(dict.fromkeys(starts)) or NEVER
        first = "|".join({re.escape(name[0]) for name in names}) or NEVER
        self._first = re.compile(first)  # of a name
        path = Path(self._folder.name) / "template.json"
        given = {"source": self.source, "mark": tokenizer.mark, "begins": begins}
        path.write_text(json.dumps(given), encoding="utf-8")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self._address)
            listener.listen(128)
            number = str(listener.fileno())
            self._process = subprocess.Popen(
                [sys.executable, "-I", sandbox.__file__, str(path), number, str(seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[listener.fileno()],
            )
        facts = self._facts(Path(folder))
        self.variables = frozenset(facts["names"])
        self.thinking = "<think>" in self.source
        self.tools = "tools" in self.variables
        self.parted = self._parted()
        self.tool_format, self.calls_in_text = self._calls()
        self._gate = asyncio.Semaphore(AT_ONCE)
        self.marks = {  # of calls, where they are special tokens
            id: token.content
            for id, token in tokenizer.backend.get_added_tokens_decoder().items()
            if token.special
            and self.tool_format
            and token.content in self.tool_format.call("", PROBE_TEXT)
        }

    def _facts(self, model: Path) -> dict[str, Any]:
        assert self._process.stdout is not None
        try:
            # Compiling may hang too, so the wait is bounded.
            ready, _, _ = select.select([self._process.stdout], [], [], START_SECONDS)
            facts = json.loads(self._process.stdout.readline()) if ready else {"error": "it hangs"}
        except ValueError:
            facts = {"error": "its process ended"}
        if "error" in facts:
            self.close()
            raise ServeError(f"{model}: chat_template is not usable: {facts['error']}")
        return facts

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.terminate()
        self._process.wait()
        self._folder.cleanup()

    def __enter__(self) -> Template:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _parted(self) -> frozenset[str]:
        """The roles whose messages it reads as lists of parts alone: as one text they would be lost."""
        found: set[str] = set()
        asked = [{"role": "user", "content": "?"}]
        for role, before, after in (
            ("user", [], []),
            ("assistant", asked, asked),
            ("system", [], asked),
        ):
            messages = [*before, {"role": role, "content": PROBE_WORDS}, *after]
            try:
                if not self._shows(_in_parts(messages, found)) and self._shows(
                    _in_parts(messages, found | {role})
                ):
                    found.add(role)
            except (OSError, ValueError):
                break  # it loops or explodes
        return frozenset(found)

    def _shows(self, messages: list[dict[str, Any]]) -> bool:
        variables = {"messages": messages, "tools": None, "add_generation_prompt": False}
        try:
            return PROBE_WORDS in self._probe(variables)
        except KeyError:
            return False  # it refuses

    def _calls(self) -> tuple[ToolFormat | None, bool]:
        """How calls of tools are read, None where they cannot be, and whether the template takes arguments as text."""
        tools = {"tools": [PROBE_TOOL], "add_generation_prompt": False}
        for arguments in (json.loads(PROBE_TEXT), PROBE_TEXT) if self.tools else ():
            try:
                made = [
                    self._probe({"messages": _in_parts(shown, self.parted)} | tools)
                    for shown in probes(arguments)
                ]
            except (OSError, ValueError, KeyError):
                continue  # it refuses, loops or explodes
            if found := format_of(*made):
                return found, isinstance(arguments, str)
        return None, False

    def _probe(self, variables: dict[str, Any]) -> str:
        with socket.socket(socket.AF_UNIX) as to:
            to.settimeout(self.seconds + 1)
            to.connect(self._address)
            to.sendall(self._asked(variables))
            with to.makefile("rb") as lines:
                return json.loads(lines.readline())["text"]

    def _asked(self, variables: dict[str, Any], marked: bool = False) -> bytes:
        tokenizer = self.tokenizer
        own = {
            "bos_token": self._name(tokenizer.bos_id),
            "eos_token": self._name(tokenizer.eos_id),
            "pad_token": self._name(tokenizer.pad_id),
        }
        return json.dumps({"variables": variables, "own": own, "marked": marked}).encode() + b"\n"

    def _name(self, token: int) -> str:
        return self.tokenizer.backend.id_to_token(token) or ""

    async def prompt(
        self,
        messages: Iterable[Mapping[str, Any]],
        more: Mapping[str, Any] | None = None,
        generation: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> tuple[list[int], bool]:
        """Tokens of a conversation up to where the answer begins, and whether it begins inside of thinking.

        `more`: further variables of the template. Errors: RequestError where it refuses, loops or explodes; ServeError where its
        process is gone.
        """
        plain: list[dict[str, Any]] = [dict(message) for message in messages]
        variables = {"messages": plain, "tools": list(tools) or None, **(more or {})}
        variables["add_generation_prompt"] = generation
        # What is long is read and cut in another thread, so that others go on.
        asked, marked = await _aside(is_long(variables), self._asks, variables)
        line = await self._render(asked)
        ids, thinks = await _aside(len(line) > LONG, self._read, line, marked)
        return ids, generation and self.thinking and thinks

    def prompt_now(self, messages: Iterable[Mapping[str, Any]]) -> list[int]:
        """The tokens alone, for callers without an event loop, or in the middle of one. Errors: as `prompt`."""
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(lambda: asyncio.run(self.prompt(messages))).result()[0]

    def _may_name(self, text: str) -> bool:
        """Whether a caller's text holds what a name of a special token begins with, as it is or as it will be read."""
        return any(map(self._first.search, (text, self.tokenizer.normalised(text))))

    def _asks(self, variables: dict[str, Any]) -> tuple[bytes, bool]:
        """The line that has them rendered, and whether names of special tokens are to be marked."""
        messages = variables["messages"]
        for message in messages:
            if self.tokenizer.simplify and isinstance(text := message.get("content"), str):
                message["content"] = normalise(text)
        variables = variables | {"messages": _in_parts(messages, self.parted)}
        bare = self.tokenizer.special.template is None
        marked = not bare and any(map(self._may_name, _strings(variables)))
        return self._asked(variables, marked), marked

    def _read(self, line: bytes, marked: bool) -> tuple[list[int], bool]:
        """Tokens of what was rendered, and whether it ends inside of thinking. Error: RequestError where it was refused."""
        result = json.loads(line)
        if "error" in result:
            raise RequestError(
                f"the model's chat template refuses these messages: {result['error']}",
                "messages",
                "template",
            )
        text, tokenizer = result["text"], self.tokenizer
        if tokenizer.special.template is None:
            ids = [*tokenizer.begin, *tokenizer.encode(text)]
        else:
            ids = tokenizer.encode_rendered(text, marked)
        return ids, text.replace(tokenizer.mark, "").rstrip().endswith("<think>")

    async def _render(self, asked: bytes) -> bytes:
        too_long = RequestError(
            f"the model's chat template did not finish within {self.seconds:g} s on these messages",
            "messages",
            "template",
        )
        try:
            async with self._gate, asyncio.timeout(self.seconds + 1):
                reader, writer = await asyncio.open_unix_connection(
                    self._address,
                    limit=13 * sandbox.CHARACTERS,  # "\\ud83d\\ude00" is one
                )
                try:
                    writer.write(asked)
                    await writer.drain()
                    line = await reader.readline()
                finally:
                    writer.close()
        except TimeoutError:
            raise too_long from None
        except OSError:
            raise ServeError("the chat template's process is gone; restart the server") from None
        if not line:
            raise too_long
        return line


async def _aside(long: bool, function: Callable[P, R], *args: P.args, **more: P.kwargs) -> R:
    """What it returns, called in another thread where it is given much."""
    return await asyncio.to_thread(function, *args, **more) if long else function(*args, **more)


def is_long(value: Any) -> bool:
    """Whether all in it together is long; it is looked through no further than that."""
    left, waiting = LONG, [value]
    while waiting and left >= 0:
        one = waiting.pop()
        if isinstance(one, str):
            left -= len(one)
        elif isinstance(one, Mapping | list):
            left -= len(one)
            if left >= 0:
                waiting += [*one, *one.values()] if isinstance(one, Mapping) else one
    return left < 0


def _in_parts(messages: Iterable[dict[str, Any]], roles: Collection[str]) -> list[dict[str, Any]]:
    """The messages, those of these roles with their text as a list of one part."""
    return [
        message | {"content": [{"type": "text", "text": message["content"]}]}
        if message["role"] in roles and isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def _strings(value: Any) -> Iterator[str]:
    """All texts in it, those that name something too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield key
            yield from _strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)
