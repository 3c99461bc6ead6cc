"""How a model is asked: in its own way, or in bare text."""

from __future__ import annotations

from shenhong.ask import answers
from shenhong.engine import Sampling
from shenhong.models import open_writer
from tests.conftest import Tiny


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
