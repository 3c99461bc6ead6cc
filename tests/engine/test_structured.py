"""Text of a prescribed form from the tokenizers that come with models: those that write a mark before a text, too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from openai import OpenAI
from tokenizers import AddedToken, normalizers

from shenhong.engine import Constraint
from shenhong.engine.structured import Grammars
from shenhong.engine.text import token_bytes
from shenhong.tokenizer import Tokenizer
from shenhong.tokenizer.tokenizer import Special
from tests.serve.running import running
from tests.tokenizer.kinds import KINDS, byte_level, folder

TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "integer"}},
            "required": ["x"],
        },
    },
}
HERMES = (
    "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content }}{% for call in m.tool_calls %}"
    "{{ '<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}{% endfor %}{{ eos_token }}{% endfor %}"
    "{{ tools | tojson if tools else '' }}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def opened(backend):
    return Tokenizer(backend, special=Special("<s>", "</s>", None, True, None))


def forced(tokenizer: Tokenizer, constraint: Constraint) -> list[int]:
    """The tokens that a model which likes none of them more than another must write."""
    grammars = Grammars(tokenizer, token_bytes(tokenizer, tokenizer.vocab_size))
    return grammars.matcher(constraint).matcher.compute_ff_tokens()


@pytest.mark.parametrize("kind", KINDS)
def test_forced_text_is_written_in_the_tokens_of_text_that_goes_on(kind):
    """As the library cuts the text behind another character, which then is taken off."""
    backend = KINDS[kind]()
    tokenizer = opened(backend)
    for text in ("schön", " yes", "the fox </s> jumps"):
        before, *ids = backend.encode(f"\n{text}", add_special_tokens=False).tokens
        if before in "▁Ġ":  # the mark; then comes the character before our text
            ids = ids[1:]
        if "</s>" in text:  # which the library would take for the end
            ids = [backend.id_to_token(id) for id in tokenizer.encode_inside(text)]
            assert "</s>" not in ids
        found = forced(tokenizer, Constraint("choice", json.dumps([text])))
        assert [backend.id_to_token(id) for id in found] == ids


MARKS = "".join(map(chr, range(32, 127)))
ODD = [MARKS, *MARKS, "\n\t", "\\x41", "(?i)a", "长城", "aa", "ab", ""]


@pytest.mark.parametrize("choices", [ODD, [f"{n:020}" for n in range(10_000)], ["x" * 100_000]])
def test_any_text_may_be_a_choice_and_as_many_as_anyone_needs(choices):
    tokenizer = opened(byte_level())
    grammars = Grammars(tokenizer, token_bytes(tokenizer, tokenizer.vocab_size))
    matcher = grammars.matcher(Constraint("choice", json.dumps(choices)))

    def takes(text):
        at = matcher.copy()
        for id in tokenizer.encode_inside(text):
            at.wrote(id)
        return at.error is None and at.matcher.is_accepting()

    assert all(map(takes, choices[-200:]))
    assert not any(map(takes, ("no such", "AA", choices[-1] + "~~")))


def test_text_that_the_tokenizer_would_change_is_written_as_it_is():
    backend = byte_level()
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    tokenizer = opened(backend)
    ids = forced(tokenizer, Constraint("choice", '[" Ａ① "]'))
    assert tokenizer.decode(ids) == " Ａ① "


def test_added_tokens_write_their_content_as_it_is():
    """DeepSeek's tokenizers have such: in the alphabet of bytes their letters would be bytes that are no character."""
    names = [*"öøüõ", "đač", "ü ü"]
    backend = byte_level(False, *(AddedToken(name, normalized=False) for name in names))
    tokenizer = opened(backend)
    for text in ("schön größer", "smørrebrød", "đačan ü ü õ", "霜ö霜"):
        ids = tokenizer.encode(text)
        assert set(map(backend.token_to_id, names)) & set(ids)
        assert tokenizer.decode(ids) == text
        bytes_of = token_bytes(tokenizer, tokenizer.vocab_size)
        assert b"".join(bytes_of[id] for id in ids).decode() == text
        assert tokenizer.decode(forced(tokenizer, Constraint("choice", json.dumps([text])))) == text


@pytest.mark.parametrize("kind", ["Prepend", "Metaspace first", "ByteLevel"])
def test_a_server_holds_answers_of_such_a_model_to_a_form(kind: str, tmp_path: Path) -> None:
    backend = KINDS[kind](AddedToken("ö", normalized=False))
    with running(folder(tmp_path / "model", backend, HERMES), tmp_path / "data") as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

        def ask(**how):
            asked = [{"role": "user", "content": "yes"}]
            said = client.chat.completions.create(
                model=server.model, messages=asked, max_tokens=200, seed=1, **how
            )
            return said.choices[0].message

        schema = {
            "type": "object",
            "properties": {"a": {"enum": ["schön", " ö"]}},
            "required": ["a"],
        }
        schema["additionalProperties"] = False
        named = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        assert json.loads(ask(response_format=named).content)["a"] in ("schön", " ö")
        assert ask(extra_body={"structured_outputs": {"choice": ["schön"]}}).content == "schön"
        assert ask(extra_body={"structured_outputs": {"regex": "yes{1,3}"}}).content[:3] == "yes"
        json_object = {"temperature": 0.0, "response_format": {"type": "json_object"}}
        assert ask(**json_object).content.startswith("{")
        call = ask(tools=[TOOL], tool_choice="required").tool_calls[0].function
        assert call.name == "f"
