"""Text while it comes: whole characters, stop strings held back, and the same text as decoding at once."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shenhong.engine import Constraint, Engine, Request, Sampling
from shenhong.engine.text import TextStream, token_bytes
from shenhong.errors import RequestError
from shenhong.tokenizer import TokenizerSettings
from shenhong.tokenizer.tokenizer import train
from tests.model.random_configs import random_config, random_decoder

TOKENIZER = train(
    ["床前明月光，疑是地上霜。", "the quick brown fox jumps over the lazy dog, again", "😀 é ü"]
    * 9,
    TokenizerSettings(vocab_size=320, isolate_ideographs=True, train_characters=2000),
)
BYTES = token_bytes(TOKENIZER, 320)
tokens_lists = st.lists(st.integers(0, 319), max_size=40)


@given(tokens_lists)
@settings(max_examples=300, deadline=None)
def test_pieces_join_to_the_text(tokens):
    stream = TextStream(BYTES)
    pieces = [stream.add(token) for token in tokens]
    assert "".join([*pieces, stream.finish()]) == TOKENIZER.decode(tokens)


@given(st.text(alphabet="床前明😀éa ", max_size=12))
@settings(max_examples=200, deadline=None)
def test_no_half_characters(text):
    stream = TextStream(BYTES)
    pieces = [stream.add(token) for token in TOKENIZER.encode(text)]
    assert "\ufffd" not in "".join(pieces) and "".join(pieces) == text and stream.finish() == ""


@given(
    st.text(alphabet="abc明", max_size=30),
    st.lists(st.text(alphabet="abc明", min_size=1, max_size=4), min_size=1, max_size=3),
)
@settings(max_examples=400, deadline=None)
def test_a_stop_string_is_never_shown(text, stop):
    stream, shown, come = TextStream(BYTES, tuple(stop)), "", []
    for token in TOKENIZER.encode(text):
        shown += stream.add(token)
        come.append(token)
        assert text.startswith(shown) and not any(s in shown for s in stop)
        if stream.stopped:
            break
    shown += stream.finish()
    assert stream.stopped == any(s in text for s in stop)
    if stream.stopped:  # before the earliest of those that were complete by then
        seen = TOKENIZER.decode(come)
        assert shown == seen[: min(seen.index(s) for s in stop if s in seen)]
        assert not any(s in TOKENIZER.decode(come[:-1]) for s in stop)
    else:
        assert shown == text


def test_what_cannot_become_a_stop_string_is_shown_at_once():
    stream = TextStream(BYTES, ("abab!",))
    shown = [stream.add(token) for token in TOKENIZER.encode("xababab")]
    assert "".join(shown) == "xab"
    assert stream.finish() == "abab"


# ------------------------------------------------------------------ in the engine


@pytest.fixture(scope="module")
def engine():
    config = random_config(
        1, vocab_size=330, eos_token_id=1, max_position_embeddings=128, tie_word_embeddings=True
    )
    return Engine(random_decoder(config, 1), TOKENIZER)


def write(engine, **options):
    asked = {"prompt": (0, 3, 4), "max_new_tokens": 100, "sampling": Sampling(1.0)} | options
    engine.submit(Request(**asked))
    text, tokens = "", []
    while engine.busy:
        for event in engine.step():
            text, tokens = text + event.text, tokens + event.tokens
    return text, tokens, event


def test_events_carry_the_text(engine):
    text, tokens, event = write(engine, stop_tokens=())
    assert len(tokens) == 100 and event.finish == "length" and text == TOKENIZER.decode(tokens)


def test_stop_strings_end_a_text(engine):
    whole, tokens, _ = write(engine, stop_tokens=(), seed=5)
    stop = whole[20:22]
    text, fewer, event = write(engine, stop_tokens=(), seed=5, stop=("never", stop))
    assert event.finish == "stop" and text == whole[: whole.index(stop)]
    assert fewer == tokens[: len(fewer)] and len(fewer) < len(tokens)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 3},
        "odd": {"type": "boolean"},
        "of": {"enum": ["月", "霜"]},
    },
    "required": ["name", "odd", "of"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_constraints_hold(engine, seed, temperature):
    how = {"seed": seed, "sampling": Sampling(temperature)}
    text, _, event = write(engine, constraint=Constraint("json", json.dumps(SCHEMA)), **how)
    value = json.loads(text)
    assert event.finish == "stop" and list(value) == ["name", "odd", "of"]
    assert len(value["name"]) <= 3 and value["of"] in "月霜" and isinstance(value["odd"], bool)
    text, _, event = write(
        engine, constraint=Constraint("choice", '["明月", "霜", "the fox"]'), **how
    )
    assert text in ("明月", "霜", "the fox") and event.finish == "stop"
    text, _, event = write(engine, constraint=Constraint("regex", "[a-c]{2}光?"), **how)
    assert (
        event.finish == "stop" and text[0] in "abc" and text[1] in "abc" and text[2:] in ("", "光")
    )


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("regex", "("),
        Constraint("json", "{"),
        Constraint("json", "[1]"),
        Constraint("json", '{"type": "nothing"}'),
        Constraint("json", '{"not": {}}'),
        Constraint("json", '{"$ref": "https://example.org/schema"}'),
        Constraint("json", '{"properties":{"a":' * 2000 + "{}" + "}}" * 2000),
        Constraint("choice", "[]"),
        Constraint("choice", '["a", 1]'),
    ],
)
def test_impossible_constraints_are_refused(engine, constraint):
    with pytest.raises(RequestError, match=f"{constraint.kind} constraint: "):
        write(engine, constraint=constraint)
    assert not engine.busy
