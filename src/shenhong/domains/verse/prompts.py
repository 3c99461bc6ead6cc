"""How a poem is asked for: "五绝 长城 押阳韵", a form, a title and a rhyme, each of which may be left out.

The one writer of that line and its one parser: the corpus is written with it, the evaluation asks with it, and what
people type or choose becomes it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from shenhong.domains.verse.prosody import FORMS, pingshui
from shenhong.errors import RequestError

_RHYME = re.compile(r"押(\S)韵")


class Prompt(NamedTuple):
    """``title`` is "" where none is named; ``rhyme`` is the last character of a group of the 平水韵."""

    form: str | None
    title: str
    rhyme: str | None

    def __str__(self) -> str:
        rhyme = self.rhyme and f"押{self.rhyme[-1]}韵"
        return " ".join(filter(None, (self.form, self.title, rhyme)))


def parse(text: str) -> Prompt:
    """What a prompt asks for. A form may also stand before the title without a space, as people type it."""
    words = text.split()
    form = rhyme = None
    if words and words[0] in FORMS:
        form, words = words[0], words[1:]
    elif words and words[0][:2] in FORMS:
        form, words[0] = words[0][:2], words[0][2:]
    if words and (found := _RHYME.fullmatch(words[-1])):
        rhyme, words = found[1], words[:-1]
    return Prompt(form, " ".join(words), rhyme)


def compose(text: str, form: str | None = None, rhyme: str | None = None) -> str:
    """The prompt for a person's words, with the form and the rhyme they chose where the words name none.

    ``rhyme`` is a group of the 平水韵, as in 七阳, or its last character. Error: RequestError for an unknown one.
    """
    if rhyme is not None:
        _check(rhyme)
    if form is None and rhyme is None:
        return text
    said = parse(text)
    if (form is None or said.form) and (rhyme is None or said.rhyme):
        return text
    return str(Prompt(said.form or form, said.title, said.rhyme or rhyme))


def _check(name: str) -> None:
    groups = [group.name for group in pingshui().groups]
    if name not in groups and name not in {group[-1] for group in groups}:
        some = "".join(group[-1] for group in groups[:30])
        raise RequestError(f"--rhyme {name}: no rhyme of the 平水韵; the level ones are {some}")
