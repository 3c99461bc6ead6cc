"""Prompts beside transformers' apply_chat_template, token by token: kinds of tokenizers, flags of tokens, tests of templates."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from shenhong.chat.template import Template
from shenhong.errors import RequestError
from shenhong.tokenizer import Tokenizer
from tests.tokenizer.kinds import KINDS, theirs

LLAMA = (  # Llama 2
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (  # TinyLlama, and Phi's way to make names of roles
    "{% for message in messages %}\n{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}\n"
    "{% endfor %}\n{% if add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}"
)
QWEN3 = """{%- for message in messages %}
    {%- set content = message.content %}
    {%- set think_end = '</think>' %}
    {%- if message.role == 'user' and content.startswith('<tool_response>') and content.endswith('</tool_response>') %}
        {{- '<|user|>a tool: ' + content }}
    {%- elif message.role == 'assistant' %}
        {%- set reasoning = '' %}
        {%- if think_end in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split(think_end)[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.last or message.keep %}
            {{- '<|assistant|><think>\\n' + reasoning + '\\n</think>\\n\\n' + content + eos_token }}
        {%- else %}
            {{- '<|assistant|>' + content | replace('<tool_call>', '(call)') + eos_token }}
        {%- endif %}
    {%- else %}
        {%- set text = '<|' ~ message.role ~ '|>' ~ content %}
        {{- text if '<|user|>' in text else '?' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|><think>\\n' }}{%- endif %}"""

NAMES = ("<|user|>", "<|assistant|>", "<think>", "</think>", "<tool_call>", "<tool_response>", "</tool_response>")  # fmt: skip
FLAGS: dict[str, dict[str, bool]] = {
    "none": {},
    "lstrip": {"lstrip": True},
    "rstrip": {"rstrip": True},
    "both": {"lstrip": True, "rstrip": True},
    "single words": {"single_word": True},
    "normalized": {"normalized": True},
}


def added(**flags: bool) -> list[AddedToken]:
    """Names as Qwen3 has them: those of thinking and calls are added, and not special."""
    flags = {"normalized": False} | flags
    return [AddedToken(name, special="|" in name, **flags) for name in NAMES]


def prompt(folder: Path, messages: list[dict[str, Any]], generation: bool = True) -> list[int]:
    with Template(folder, Tokenizer.load(folder), 5.0) as template:
        return asyncio.run(template.prompt(messages, None, generation))[0]


def saved(tmp_path: Path, backend: Backend, template: str) -> Any:
    """The tokenizer of transformers, saved."""
    found = theirs(backend, template)
    found.save_pretrained(tmp_path)
    return found


def asked(*texts: str) -> list[dict[str, Any]]:
    return [
        {"role": "assistant" if number % 2 else "user", "content": text}
        for number, text in enumerate(texts)
    ]


CASES = [(kind, flags) for kind in KINDS for flags in ("none", "both")]
CASES += [("Metaspace first", flags) for flags in FLAGS if flags not in ("none", "both")]


@pytest.mark.parametrize(("kind", "flags"), CASES)
def test_ids_are_those_of_apply_chat_template(kind: str, flags: str, tmp_path: Path) -> None:
    """Also where a caller's text is odd enough to be told from the template's own: "a < b" holds what names begin with."""
    backend = KINDS[kind](*added(**FLAGS[flags]))
    for number, source in enumerate((LLAMA, ZEPHYR, QWEN3)):
        folder = tmp_path / str(number)
        beside = saved(folder, backend, source)
        with Template(folder, Tokenizer.load(folder), 5.0) as template:
            for texts in (
                ["hello world"],
                [" the fox ", "yes\n\n", "and  again 霜"],
                ["a < b [x]", "yes <", " < no"],
            ):
                wanted = beside.apply_chat_template(
                    asked(*texts), add_generation_prompt=True, return_dict=False
                )
                assert asyncio.run(template.prompt(asked(*texts)))[0] == wanted


def test_flags_and_tokens_may_stand_in_tokenizer_config_alone(tmp_path: Path) -> None:
    backend = KINDS["Metaspace first"](*added())
    saved(tmp_path, backend, QWEN3)
    path, number = tmp_path / "tokenizer_config.json", backend.get_vocab_size()
    said = {
        "content": "<|user|>",
        "lstrip": True,
        "rstrip": True,
        "normalized": False,
        "special": True,
    }
    more = {str(backend.token_to_id("<|user|>")): said, str(number): said | {"content": "<|new|>"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": more}))
    beside = AutoTokenizer.from_pretrained(tmp_path)
    wanted = beside.apply_chat_template(
        asked(" fox "), add_generation_prompt=True, return_dict=False
    )
    assert beside.convert_tokens_to_ids("<|new|>") == number
    assert prompt(tmp_path, asked(" fox ")) == wanted
    assert number not in prompt(tmp_path, asked("<|new|>"))  # special, and written by a caller


def test_a_template_reads_messages_as_they_were_sent(tmp_path: Path) -> None:
    backend = KINDS["ByteLevel"](*added())
    beside = saved(tmp_path, backend, QWEN3)
    for messages in (
        asked("hello", "<think>\nhm\n</think>\n\nyes", "and again"),
        asked("hello", "<think>\nhm\n</think>\n\nyes"),
        asked("<tool_response>42</tool_response>", "no"),
        asked("hello", "<tool_call>the</tool_call>", "again"),
    ):
        text = beside.apply_chat_template(messages, tokenize=False)
        ids = prompt(tmp_path, messages, False)
        assert beside.decode(ids) == text
        if "<tool" not in text:  # nothing of a message is left that is a token's name
            assert ids == beside.apply_chat_template(messages, return_dict=False)


def test_names_that_a_caller_writes_stay_text_whatever_the_template_does(tmp_path: Path) -> None:
    backend = KINDS["Metaspace first"](*added())
    beside = saved(tmp_path, backend, QWEN3)
    special = {backend.token_to_id(name) for name in (*NAMES, "<s>", "</s>")}

    def names(messages: list[dict[str, Any]]) -> list[int]:
        return [id for id in prompt(tmp_path, messages) if id in special]

    odd = "".join(NAMES) + "</s><|us<|user|>er|>"
    for texts in (["x", "y", "z"], ["<think>a</think>", "b", "</think>"]):
        plain = [text.replace("<", "").replace(">", "") for text in texts]
        assert names(asked(*[text + odd for text in texts])) == names(asked(*plain))
    text = beside.apply_chat_template(asked(odd), tokenize=False)
    ids = prompt(tmp_path, asked(odd), False)
    assert beside.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_a_name_that_only_a_normaliser_makes_is_text(tmp_path: Path) -> None:
    backend = KINDS["ByteLevel"](AddedToken("<|user|>", special=True, normalized=True))
    backend.normalizer = normalizers.NFKC()
    saved(tmp_path, backend, ZEPHYR)
    user = backend.token_to_id("<|user|>")
    assert prompt(tmp_path, asked("＜|user|＞")).count(user) == 1


def test_an_answer_begins_inside_of_thinking_only_where_the_template_says_so(
    tmp_path: Path,
) -> None:
    saved(tmp_path, KINDS["ByteLevel"](*added()), QWEN3)
    with Template(tmp_path, Tokenizer.load(tmp_path), 5.0) as template:
        for text in ("hello", "<think>", "a </think> < b"):
            assert asyncio.run(template.prompt(asked(text)))[1]
            assert not asyncio.run(template.prompt(asked(text), None, False))[1]


PARTS = (  # SmolVLM, Idefics 3
    "<s>{% for message in messages %}{{ message['role'] | capitalize }}: {% for line in message['content'] %}"
    "{% if line['type'] == 'text' %}{{ line['text'] }}{% endif %}{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
MIXED = PARTS.replace(
    "{% for line in", "{% if message['role'] == 'system' %}{{ message['content'] }}{% else %}{% for line in"
).replace("{% endfor %}</s>", "{% endfor %}{% endif %}</s>")  # fmt: skip


@pytest.mark.parametrize(("source", "texts"), [(PARTS, ()), (MIXED, ("system",)), (ZEPHYR, ("system", "user", "assistant"))])  # fmt: skip
def test_a_template_that_reads_parts_is_given_parts(
    source: str, texts: tuple[str, ...], tmp_path: Path
) -> None:
    beside = saved(tmp_path, KINDS["ByteLevel"](*added()), source)
    messages = [{"role": "system", "content": "again"}, *asked("the fox", "yes", "a < b")]
    parts = [
        m if m["role"] in texts else m | {"content": [{"type": "text", "text": m["content"]}]}
        for m in messages
    ]
    wanted = beside.apply_chat_template(parts, add_generation_prompt=True, return_dict=False)
    assert prompt(tmp_path, messages) == wanted
    assert "the fox" in beside.decode(wanted)


def test_templates_by_name_are_taken_as_transformers_takes_them(tmp_path: Path) -> None:
    tools = "\n{% if tools %}{{ tools[0]['function']['name'] }}\n{% endif %}"
    named = {"tool_use": f"{tools}{ZEPHYR}\n", "default": f" {ZEPHYR}", "rag": "?"}
    beside = theirs(KINDS["ByteLevel"](*added()), named)  # type: ignore[arg-type]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    for old in (False, True):
        folder = tmp_path / str(old)
        beside.save_pretrained(folder, save_jinja_files=not old)
        assert (folder / "additional_chat_templates" / "rag.jinja").exists() != old
        with Template(folder, Tokenizer.load(folder), 5.0) as template:
            for tools_given in ([], [tool]):
                wanted = beside.apply_chat_template(
                    asked("yes"), tools=tools_given or None, return_dict=False
                )
                assert (
                    asyncio.run(template.prompt(asked("yes"), None, False, tools_given))[0]
                    == wanted
                )


def test_templates_without_a_default_are_named(tmp_path: Path) -> None:
    beside = theirs(KINDS["ByteLevel"](), {"rag": ZEPHYR, "tool_use": ZEPHYR})  # type: ignore[arg-type]
    beside.save_pretrained(tmp_path, save_jinja_files=False)
    with pytest.raises(ValueError, match="no default"):
        beside.apply_chat_template(asked("yes"))
    with pytest.raises(RequestError, match="called rag, tool_use, and none is the default"):
        prompt(tmp_path, asked("yes"))


def test_a_template_in_chat_template_json_is_read(tmp_path: Path) -> None:
    beside = saved(tmp_path, KINDS["ByteLevel"](*added()), ZEPHYR)
    (tmp_path / "chat_template.jinja").unlink()
    assert Tokenizer.load(tmp_path).special.template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": ZEPHYR}))
    assert prompt(tmp_path, asked("yes")) == beside.apply_chat_template(
        asked("yes"), add_generation_prompt=True, return_dict=False
    )
