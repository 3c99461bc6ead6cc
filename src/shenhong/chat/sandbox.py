"""Renders one chat template for its server, each time in a process of its own that the kernel ends in time.

Started as a file by `template.Template`, so that it loads jinja2 and nothing of ours. It compiles the template once,
then forks for every rendering: a template that loops, explodes or crashes takes only its own rendering with it. A
child has limits on processor time, memory, open files and length of output; jinja's sandbox keeps it from Python's inner parts.

On the Unix socket: a JSON line {"variables", "own", "marked"} in, a JSON line {"text"} or {"error"} out; no line: it
was ended. `own`: variables that are names of special tokens. `marked`: a mark stands in every name of a special token
that the template itself writes, so that it can be told from one in a message; the messages are as they were sent, for
a template may look at them. When standard input closes, the server is gone and so is this.
"""

import contextlib
import json
import os
import re
import resource
import select
import signal
import socket
import sys
from datetime import datetime

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 512 * 2**20  # bytes of address space a rendering may hold
CHARACTERS = 4_000_000  # of one rendering
FILES = 16  # open at once; jinja opens one now and then to load a part of itself


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


# Methods of a text that look for their first argument in it, and filters that write what they are given.
ENDS = ("startswith", "endswith", "removeprefix", "removesuffix", "partition", "rpartition")
PLACES = ("count", "find", "index", "replace", "rfind", "rindex", "rsplit", "split")
LOOKING = frozenset((*ENDS, *PLACES))
WRITING = frozenset(("d", "default", "format", "join"))


class Marks:
    """Tells what a template writes of itself from what it was given: a mark in all of its own that may begin a name.

    Marked text may be looked at as well: what is compared is compared without marks, and what is looked for in a text
    is looked for as it stands there.
    """

    def __init__(self, mark: str, begins: str) -> None:
        self.mark, self.begins = mark, re.compile(begins)

    def put(self, text: str) -> str:
        return self.begins.sub(lambda found: found[0] + self.mark, text)

    def bare(self, value):
        return value.replace(self.mark, "") if isinstance(value, str) else value

    def as_in(self, text, value):
        """The value as it stands in the text."""
        value = self.bare(value)
        if isinstance(text, str) and isinstance(value, str) and self.put(value) in text:
            return self.put(value)
        return value

    def holds(self, whole, value) -> bool:
        """`value in whole`."""
        value = self.bare(value)
        return value in whole or (isinstance(value, str) and self.put(value) in whole)

    @pass_context
    def looked(self, context, text, method, *args, **named):
        """`text.method(*args)`."""
        called = context.environment.getattr(text, method)
        wanted = self.as_in(text, args[0])
        return context.environment.call(context, called, wanted, *args[1:], **named)

    def marked(self, node: nodes.Node, written: bool = True) -> nodes.Node:
        """The node with marks in what it writes. `written`: its value may be."""
        if isinstance(node, nodes.TemplateData):
            node.data = self.put(node.data)
        elif isinstance(node, nodes.Const) and isinstance(node.value, str) and written:
            node.value = self.put(node.value)
        for name, value in node.iter_fields():
            if isinstance(value, nodes.Node):
                setattr(node, name, self.marked(value, written and self._writes(node, name, 0)))
            elif isinstance(value, list):
                found = [
                    self.marked(one, written and self._writes(node, name, number))
                    if isinstance(one, nodes.Node)
                    else one
                    for number, one in enumerate(value)
                ]
                setattr(node, name, found)
        return self._looking(node)

    def _writes(self, node: nodes.Node, field: str, number: int) -> bool:
        """Whether the value of what stands in a field of a node, at this place in it, may be written."""
        if isinstance(node, nodes.Compare | nodes.Operand | nodes.Test | nodes.Slice):
            return False
        if isinstance(node, nodes.Filter) and field == "args":
            return node.name in WRITING or (node.name == "replace" and number == 1)
        if isinstance(node, nodes.Call) and field == "args":
            method = node.node.attr if isinstance(node.node, nodes.Getattr) else ""
            return method not in LOOKING | {"get"} or (method == "replace" and number == 1)
        keys = (nodes.Getitem, "arg"), (nodes.Pair, "key"), (nodes.Keyword, "key")
        return field != "test" and not any(isinstance(node, k) and field == f for k, f in keys)

    def _looking(self, node: nodes.Node) -> nodes.Node:
        """What compares or looks for something, so that marks do not hide it."""
        if isinstance(node, nodes.Compare):
            if node.ops[0].op in ("in", "notin") and len(node.ops) == 1:
                found = _filtered(node.ops[0].expr, "holds", node.expr)
                return nodes.Not(found, lineno=node.lineno) if node.ops[0].op == "notin" else found
            node.expr = _filtered(node.expr, "bare")
            for operand in node.ops:
                operand.expr = _filtered(operand.expr, "bare")
        elif isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
            if node.node.attr in LOOKING and node.args:
                method = nodes.Const(node.node.attr)
                found = _filtered(node.node.node, "looked", method, *node.args)
                for rest in ("kwargs", "dyn_args", "dyn_kwargs"):
                    setattr(found, rest, getattr(node, rest))
                return found
        elif isinstance(node, nodes.Filter) and node.name == "replace" and node.args and node.node:
            text = _filtered(node.node, "string")
            return _filtered(text, "looked", nodes.Const("replace"), *node.args)
        return node


def _filtered(node: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def render(template, variables: dict) -> str:
    pieces, characters_left = [], CHARACTERS
    for piece in template.generate(**variables):
        pieces.append(piece)
        characters_left -= len(piece)
        if characters_left < 0:
            raise TemplateError(f"it writes more than {CHARACTERS} characters")
    return "".join(pieces)


def answer(connection: socket.socket, plain, marked, marks: Marks, seconds: float) -> None:
    """In the child: one rendering, within its limits."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    for what, most in (
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_NOFILE, FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(what, (most, most))
    with connection.makefile("rb") as lines:
        asked = json.loads(lines.readline())
    template, own = plain, asked["own"]
    if asked["marked"]:
        template, own = marked, {name: marks.put(text) for name, text in own.items()}
    result: dict[str, str]
    try:
        result = {"text": render(template, asked["variables"] | own)}
    except MemoryError:
        result = {"error": "it needs too much memory"}
    except RecursionError:
        result = {"error": "it recurses without end"}
    except Exception as error:
        result = {"error": marks.bare(str(error))[:300] or type(error).__name__}
    connection.sendall(json.dumps(result).encode() + b"\n")


def main(path: str, listener: socket.socket, seconds: float) -> None:
    """`path`: a JSON file with the template's "source", and for the marks "mark" and "begins", the pattern of names."""
    with open(path, encoding="utf-8") as file:
        given = json.load(file)
    marks = Marks(given["mark"], given["begins"])
    made = environment()
    made.filters |= {"bare": marks.bare, "holds": marks.holds, "looked": marks.looked}
    try:
        plain, tree = made.from_string(given["source"]), made.parse(given["source"])
        names = sorted({name.name for name in tree.find_all(nodes.Name)})
        marks.marked(tree)
        code = made.compile(tree)
        marked = Template.from_code(made, code, made.make_globals(None))
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
                answer(connection, plain, marked, marks, seconds)
            finally:
                os._exit(0)
        connection.close()


if __name__ == "__main__":
    main(sys.argv[1], socket.socket(fileno=int(sys.argv[2])), float(sys.argv[3]))
