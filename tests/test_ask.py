"""How a model is asked: the poet in its form, any model in bare text, and none by a rhyme that is none."""

from __future__ import annotations

import pytest

from shenhong.ask import answers, poem
from shenhong.engine import Sampling
from shenhong.errors import RequestError
from shenhong.models import open_writer
from tests.conftest import Tiny


@pytest.mark.parametrize(
    ("form", "rhyme", "asked"),
    [
        (None, None, "长城"),
        ("五绝", None, "五绝 长城"),
        (None, "阳", "长城 押阳韵"),
        ("七律", "七阳", "七律 长城 押阳韵"),
    ],
)
def test_the_poet_is_asked_as_it_was_taught(form: str, rhyme: str, asked: str) -> None:
    assert poem("长城", form, rhyme) == asked


@pytest.mark.parametrize("rhyme", ["阴", "", "七", "七阳阳"])
def test_no_such_rhyme(rhyme: str) -> None:
    with pytest.raises(RequestError, match=f"--rhyme {rhyme}: no rhyme .* the level ones are 东冬"):
        poem("长城", None, rhyme)


def test_a_message_begins_an_answer_and_plain_text_is_gone_on_with(tiny: Tiny) -> None:
    writer = open_writer(tiny.run)
    tokenizer = writer.tokenizer
    message = tokenizer.encode_prompt("长城")
    bare = [*tokenizer.begin, *tokenizer.encode("长城")]
    assert len(message) > len(bare) > 0
    wanted = []
    for ids in (message, bare):
        (done,) = writer.engine.generate([ids], 30, sampling=Sampling(), seed=0)
        wanted.append([tokenizer.decode(done.tokens)])
    assert wanted[0] != wanted[1]
    assert [answers(tiny.run, ["长城"], 30, plain=plain) for plain in (False, True)] == wanted
