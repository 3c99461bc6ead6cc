"""Chat templates: the model's own, and those that loop, explode, crash or reach for what is not theirs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from shenhong.chat.template import Template
from shenhong.errors import RequestError, ServeError
from shenhong.tokenizer import Tokenizer
from shenhong.tokenizer.tokenizer import CHAT_TEMPLATE, SPECIAL
from tests.conftest import Tiny
from tests.serve.running import with_template

PIECES = [*SPECIAL, "<", "｜", "<｜", "User", "｜>", "长城", " a", "\ue000", "</think>"]


@pytest.fixture(scope="module")
def template(tiny: Tiny) -> Any:
    with Template(tiny.run / "model", Tokenizer.load(tiny.run / "model"), 2.0) as made:
        yield made


@settings(deadline=None, max_examples=30)
@given(
    texts=st.lists(
        st.lists(st.sampled_from(PIECES), max_size=6).map("".join), min_size=1, max_size=4
    )
)
def test_no_text_becomes_a_special_token(template: Template, texts: list[str]) -> None:
    """Each message keeps to its place, whatever it says; one user message is what `generate` sends."""
    tokenizer = template.tokenizer
    roles = ["system", "user", "assistant", "user"]
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    ids, thinking = asyncio.run(template.prompt(messages))
    wanted = [tokenizer.bos_id]
    before = {"system": [], "user": [tokenizer.user_id], "assistant": [tokenizer.assistant_id]}
    after = {"system": [], "user": [], "assistant": [tokenizer.eos_id]}
    for message in messages:
        role = message["role"]
        wanted += [*before[role], *tokenizer.encode_prompt(message["content"])[2:-1], *after[role]]
    assert ids == [*wanted, tokenizer.assistant_id] and not thinking


def test_plain_messages_are_rendered_as_transformers_does(tiny: Tiny, template: Template) -> None:
    messages = [
        {"role": r, "content": t}
        for r, t in (("user", "长城"), ("assistant", "月"), ("user", "明月"))
    ]
    theirs = AutoTokenizer.from_pretrained(tiny.run / "model")
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert asyncio.run(template.prompt(messages))[0] == wanted


def test_a_long_rendering_of_any_characters_arrives(tiny: Tiny, tmp_path: Path) -> None:
    folder = with_template(tiny.run / "model", tmp_path / "model", "{{ '\U0001f600' * 3900000 }}")
    with Template(folder, Tokenizer.load(folder), 60.0) as made:
        line = asyncio.run(made._render(made._asked({})))
        assert len(json.loads(line)["text"]) == 3_900_000


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = ("loops",)  # ended by their time alone
HOSTILE = {
    "loops": LOOP,
    "recurses": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "writes without end": "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "takes memory": "{{ ('x' * 999999999) | length }}{% set y = 'y' * 999999999 %}{{ y | length }}",
    "formats": "{{ '%999999999d' % 1 }}",
    "reaches out": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "changes": "{{ messages.append(1) }}",
    "imports": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "refuses": "{{ raise_exception('roles must alternate') }}",
    "divides": "{{ 1 // 0 }}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_template_costs_only_its_caller(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    """The template is harmless until a message says 'boom'; then one caller gets a 400 in time."""
    source = (
        "{% if messages[0]['content'] == 'boom' %}" + HOSTILE[kind] + "{% endif %}" + CHAT_TEMPLATE
    )
    folder = with_template(tiny.run / "model", tmp_path / "model", source)

    async def both(template: Template) -> tuple[Any, Any, bool]:
        boom = asyncio.create_task(template.prompt([{"role": "user", "content": "boom"}]))
        await asyncio.sleep(0.02)
        fine = await template.prompt([{"role": "user", "content": "长城"}])
        waited = boom.done() and kind in ENDLESS  # for what ends with its time alone
        (result,) = await asyncio.gather(boom, return_exceptions=True)
        return result, fine, waited

    seconds = 3.0 if kind in ENDLESS else 30.0  # the others end at once, and need none of it
    with Template(folder, Tokenizer.load(folder), seconds) as template:
        result, fine, waited = asyncio.run(both(template))
    assert (
        isinstance(result, RequestError) and result.code == "template" and "template" in str(result)
    )
    assert "\n" not in str(result)
    assert fine[0] == Tokenizer.load(folder).encode_prompt("长城")
    assert not waited


def test_a_rendering_may_hold_few_files_open(tiny: Tiny, tmp_path: Path) -> None:
    source = "{% if messages[0]['content'] == 'boom' %}" + LOOP + "{% endif %}" + CHAT_TEMPLATE
    folder = with_template(tiny.run / "model", tmp_path / "model", source)

    async def limits(template: Template) -> str:
        boom = asyncio.create_task(template.prompt([{"role": "user", "content": "boom"}]))
        proc, pid = Path("/proc"), template._process.pid
        while not (child := (proc / f"{pid}/task/{pid}/children").read_text().strip()):
            await asyncio.sleep(0.01)
        while "Max cpu time              unlimited" in (
            found := (proc / child / "limits").read_text()
        ):
            await asyncio.sleep(0.01)
        os.kill(int(child), signal.SIGKILL)
        await asyncio.gather(boom, return_exceptions=True)
        return found

    with Template(folder, Tokenizer.load(folder), 30.0) as template:
        found = asyncio.run(limits(template))
    (files,) = (line for line in found.splitlines() if line.startswith("Max open files"))
    assert files.split()[3:5] == ["16", "16"]


@pytest.mark.parametrize("source", ["{% for %}", "{{ 'x' ", "{% include 'x' %}"[:8]])
def test_a_broken_template_is_refused_at_the_start(source: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = with_template(tiny.run / "model", tmp_path / "model", source)
    with pytest.raises(ServeError, match="chat_template"):
        Template(folder, Tokenizer.load(folder), 1.0)


def test_constant_folding_does_not_hang_the_start(tiny: Tiny, tmp_path: Path) -> None:
    folder = with_template(tiny.run / "model", tmp_path / "model", "{{ 'x' * 9999999999 }}")
    begun = time.monotonic()
    with Template(folder, Tokenizer.load(folder), 1.0) as template, pytest.raises(RequestError):
        asyncio.run(template.prompt([]))
    assert time.monotonic() - begun < 60
