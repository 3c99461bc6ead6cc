"""What a format of tool calls is: the signs around names and arguments.

A format is one file in this folder that offers its `ToolFormat`s as ``FORMATS``. Those that differ in white space alone
belong in one file, in the order in which they are to be tried.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

ID, NINE = "\0", "123456789"  # any word, and one that every template takes


@dataclass(frozen=True)
class ToolFormat:
    """One way to write calls: mark, opened, call (more, call)*, closed; a call is head, arguments, one of the tails.

    White space between signs is written as it is here, and read in any measure. `mark`: where calls begin in a text;
    empty: they are the whole answer. `head`: with %s for the name. `more`: None where there is only one call. `tails`:
    the first is written, all are read; in them ID stands for any word. `pair`: what stands before, between and behind
    name and value of an argument; None: the arguments are one JSON object.
    """

    mark: str
    opened: str
    head: str
    tails: tuple[str, ...]
    more: str | None
    closed: str
    pair: tuple[str, str, str] | None = None

    def call(self, name: str, arguments: str, tail: int = 0) -> str:
        """A whole answer of one call."""
        if self.pair:
            before, between, behind = self.pair
            arguments = "".join(
                before
                + key
                + between
                + (value if isinstance(value, str) else json.dumps(value))
                + behind
                for key, value in json.loads(arguments).items()
            )
        written = self.mark + self.opened + self.head % name + arguments + self.tails[tail]
        return written.replace(ID, NINE) + self.closed
