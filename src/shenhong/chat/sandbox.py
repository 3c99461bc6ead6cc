"""Renders one chat template for its server, each time in a process of its own that the kernel ends in time.

Started as a file by `template.Template`, so that it loads jinja2 and nothing of ours. It compiles the template once,
then forks for every rendering: a template that loops, explodes or crashes takes only its own rendering with it. A
child has limits on processor time, memory and length of output; jinja's sandbox keeps it from Python's inner parts.

On the Unix socket: a JSON line with the variables in, a JSON line {"text"} or {"error"} out; no line: it was ended.
When standard input closes, the server is gone and so is this.
"""

import contextlib
import json
import os
import resource
import select
import signal
import socket
import sys
from datetime import datetime

from jinja2 import TemplateError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 512 * 2**20  # bytes of address space a rendering may hold
CHARACTERS = 4_000_000  # of one rendering


def refuse(message: str) -> None:
    """What a template calls for messages it cannot render."""
    raise TemplateError(message)


@pass_context
def as_it_is(_, value):
    """Takes the context, so that jinja cannot know what is written before it renders."""
    return value


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """jinja's own would write < and > for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class Generation(Extension):
    """Templates may mark what the model wrote, for training; here the marks mean nothing."""

    tags = {"generation"}  # noqa: RUF012 (as jinja has it)

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """As transformers sets it up. Constants are not folded, for that would compute them while compiling."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[loopcontrols, Generation],
        optimized=False,
        finalize=as_it_is,
    )
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return made


def render(template, variables: dict) -> str:
    pieces, characters_left = [], CHARACTERS
    for piece in template.generate(**variables):
        pieces.append(piece)
        characters_left -= len(piece)
        if characters_left < 0:
            raise TemplateError(f"it writes more than {CHARACTERS} characters")
    return "".join(pieces)


def answer(connection: socket.socket, template, seconds: float) -> None:
    """In the child: one rendering, within its limits."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    for what, most in (
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(what, (most, most))
    with connection.makefile("rb") as lines:
        variables = json.loads(lines.readline())
    result: dict[str, str]
    try:
        result = {"text": render(template, variables)}
    except MemoryError:
        result = {"error": "it needs too much memory"}
    except RecursionError:
        result = {"error": "it recurses without end"}
    except Exception as error:
        result = {"error": str(error)[:300] or type(error).__name__}
    connection.sendall(json.dumps(result).encode() + b"\n")


def main(path: str, listener: socket.socket, seconds: float) -> None:
    with open(path, encoding="utf-8") as file:
        source = file.read()
    made = environment()
    try:
        template = made.from_string(source)
        names = sorted({name.name for name in made.parse(source).find_all(nodes.Name)})
        facts: dict = {"names": names}
    except (TemplateError, RecursionError) as error:
        facts = {"error": str(error)[:300]}
    print(json.dumps(facts), flush=True)
    if "error" in facts:
        return
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server says when to end
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            try:
                answer(connection, template, seconds)
            finally:
                os._exit(0)
        connection.close()


if __name__ == "__main__":
    main(sys.argv[1], socket.socket(fileno=int(sys.argv[2])), float(sys.argv[3]))
