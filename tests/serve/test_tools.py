"""Tools: what a template makes of them, what the official client gets back, and what is refused."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from transformers import AutoTokenizer

from shenhong.chat.template import Template
from shenhong.chat.tool_calls import Offer
from shenhong.chat.tool_formats.deepseek import DEEPSEEK, FENCED
from shenhong.chat.tool_formats.glm import GLM
from shenhong.chat.tool_formats.hermes import TAGGED
from shenhong.chat.tool_formats.llama import BARE
from shenhong.chat.tool_formats.mistral import LISTED, LISTED_CLOSELY, MARKED
from shenhong.chat.tool_formats.qwen_coder import CODER
from shenhong.engine import Constraint
from shenhong.engine.structured import Grammars
from shenhong.serve.openai import chat as chat_endpoint
from shenhong.serve.openai.schemas import ChatRequest, Function
from shenhong.serve.openai.tools import calls_constraint
from shenhong.tokenizer import Tokenizer
from shenhong.tokenizer.tokenizer import SPECIAL
from tests.conftest import Tiny
from tests.serve.running import Running, in_step, running, with_template

# As Qwen 2.5 writes it, with the marks of the tiny model.
QWEN = """{{ bos_token }}
{%- if tools %}
    {{- "# Tools\\n\\nYou may call functions:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\nReturn <tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call>" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {{- "<｜Assistant｜>" + message.content }}
        {%- for tool_call in message.tool_calls %}
            {%- set tool_call = tool_call.function %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif message.role == "tool" %}
        {{- "<｜User｜><tool_response>\\n" + message.content + "\\n</tool_response>" }}
    {%- else %}
        {{- "<｜User｜>" + message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<｜Assistant｜>" }}{%- endif %}"""

# As Llama 3.1 writes it.
LLAMA = """{{ bos_token }}
{%- if tools is not none %}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception("only single calls") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<｜Assistant｜>{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" + eos_token }}
    {%- elif message.role == "assistant" %}
        {{- "<｜Assistant｜>" + message.content + eos_token }}
    {%- else %}
        {{- "<｜User｜>" + message.content }}
    {%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- "<｜Assistant｜>" }}{%- endif %}"""


def written(call: str, between: str = "", opened: str = "", closed: str = "") -> str:
    """A template that writes calls so, with the marks of the tiny model."""
    return (
        "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content }}{% for tool in m.tool_calls %}"
        "{% if loop.first %}{{ OPENED }}{% else %}{{ BETWEEN }}{% endif %}{{ CALL }}"
        "{% if loop.last %}{{ CLOSED }}{% endif %}{% endfor %}{{ eos_token }}"
        "{% else %}{{ '<｜User｜>' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
    ).replace("CALL", call).replace("OPENED", opened).replace("BETWEEN", between).replace("CLOSED", closed)  # fmt: skip


NAME, GIVEN = "tool.function.name", "tool['function']['arguments']"
# DeepSeek's take arguments as text.
V3 = written(
    f"'<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + {NAME} + '\\n' + '```json' + '\\n' + {GIVEN} + '\\n' + '```' + '<｜tool▁call▁end｜>'",
    "'\\n'", "'<｜tool▁calls▁begin｜>'", "'<｜tool▁calls▁end｜>'",
)  # fmt: skip
V31 = written(
    f"'<｜tool▁call▁begin｜>' + {NAME} + '<｜tool▁sep｜>' + {GIVEN} + '<｜tool▁call▁end｜>'",
    "''", "'<｜tool▁calls▁begin｜>'", "'<｜tool▁calls▁end｜>'",
)  # fmt: skip
NINE = "raise_exception('ids have nine letters') if tool.id | length != 9 else ''"
MISTRAL = written(
    f"({NINE}) + (tool.function | tojson)[:-1] + ', \"id\": \"' + tool.id + '\"}}'",
    "', '", "'[TOOL_CALLS] ['", "']'",
)  # fmt: skip
TEKKEN = MISTRAL.replace("[TOOL_CALLS] [", "[TOOL_CALLS][")
MINISTRAL = written(f"'[TOOL_CALLS]' + {NAME} + '[ARGS]' + ({GIVEN} | tojson)", "''", "''", "''")

PAIRS = "{% for k, v in tool.function.arguments.items() %}LINE{% endfor %}"
VALUE = "{{ v if v is string else v | tojson }}"
QWEN_CODER = written(
    "'<tool_call>\\n<function=' + tool.function.name + '>\\n' }}"
    + PAIRS.replace("LINE", f"{{{{ '<parameter=' + k + '>\\n' }}}}{VALUE}{{{{ '\\n</parameter>\\n' }}}}")
    + "{{ '</function>\\n</tool_call>'", "'\\n'", "''", "''",
)  # fmt: skip
GLM_45 = written(
    "'\\n<tool_call>' + tool.function.name + '\\n' }}"
    + PAIRS.replace("LINE", f"<arg_key>{{{{ k }}}}</arg_key>{{{{ '\\n' }}}}<arg_value>{VALUE}</arg_value>{{{{ '\\n' }}}}")
    + "{{ '</tool_call>'", "''", "''", "''",
)  # fmt: skip

# Calls that are not read: as Mistral Small 3.2 and Apriel write them; one that is never written, one that fails.
UNREAD = [
    written(f"'[TOOL_CALLS]' + {NAME} + '[CALL_ID]' + tool.id + '[ARGS]' + ({GIVEN} | tojson)", "''", "''", "''"),
    written("'<tool_calls>[' + (tool.function | tojson) + ']</tool_calls>'", "''", "''", "''"),
    written("'<tool_call>'", "''", "''", "''"),
    written("raise_exception('no calls')", "''", "''", "''"),
    "{{ tools }}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
]  # fmt: skip

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather <now> & here <｜User｜>",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"$ref": "#/$defs/city"},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["長安", "洛陽"]}},
        },
    },
}
TIME: Any = {"type": "function", "function": {"name": "time"}}
ASKED: Any = [{"role": "user", "content": "天气"}]


def with_room(tiny: Tiny, folder: Path, template: str) -> Path:
    """The tiny model with a template, and a context that a list of tools fits into."""
    copy = with_template(tiny.run / "model", folder, template)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return copy


@pytest.fixture(scope="module")
def handy(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server of one model by many templates."""
    folder = tmp_path_factory.mktemp("tools")
    models = [
        with_room(tiny, folder / "tagged", QWEN),
        with_room(tiny, folder / "bare", LLAMA),
        with_room(tiny, folder / "thinks", QWEN + "{{ '<think>\\n' }}"),
        with_room(tiny, folder / "v3", V3),
        with_room(tiny, folder / "v31", V31),
        with_room(tiny, folder / "coder", QWEN_CODER),
        with_room(tiny, folder / "mistral", MISTRAL),
    ]
    for name in ("tokenizer.json", "tokenizer_config.json"):  # Mistral's mark is a special token
        path = models[-1] / name
        path.write_text(path.read_text().replace(SPECIAL[2], "[TOOL_CALLS]"))
    with running(models, folder / "data") as server:
        yield server


@pytest.fixture(scope="module")
def client(handy: Running) -> OpenAI:
    return handy.openai()


def ask(client: OpenAI, model: str = "tagged", **more: Any) -> Any:
    body = {"messages": ASKED, "tools": [WEATHER, TIME], "max_tokens": 300, "seed": 4}
    return client.chat.completions.create(model=model, **(body | more))


NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize("model", ["tagged", "bare", "thinks", "v3", "v31", "mistral"])
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_forced_calls_fit_their_schema(
    client: OpenAI, model: str, choice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = chat_endpoint.calls_constraint

    def short(*given: Any) -> Any:
        """This model would think for ever."""
        value = whole(*given).value
        assert ("thought[lazy]" in value) == (model == "thinks")
        lines = ['thought: "hm.</think>"' if "thought[" in x else x for x in value.splitlines()]
        return Constraint("grammar", "\n".join(lines))

    monkeypatch.setattr(chat_endpoint, "calls_constraint", short)
    for seed in range(3):
        (answer,) = ask(client, model, tool_choice=choice, seed=seed, max_tokens=900).choices
        assert answer.message.content is None and answer.finish_reason == "tool_calls"
        if model == "thinks":
            assert answer.message.reasoning_content == "hm."
        calls = answer.message.tool_calls
        assert len({call.id for call in calls}) == len(calls) > 0
        for call in calls:
            if choice is NAMED or call.function.name == "get_weather":
                assert call.function.name == "get_weather"
                value = json.loads(call.function.arguments)
                assert set(value) == {"city", "days"}
                assert value["city"] in ("長安", "洛陽") and value["days"] in range(1, 10)
            else:
                assert (call.function.name, call.function.arguments) == ("time", "{}")


def test_a_stream_of_calls_is_put_together_as_the_client_does(
    client: OpenAI, handy: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: Any = {"tool_choice": "required", "n": 2, "logprobs": True}
    whole = ask(client, **how)
    in_step(monkeypatch, handy)
    calls: list[dict[int, dict[str, str]]] = [{}, {}]
    ends, count, told = ["", ""], [0, 0], 0
    for chunk in ask(client, stream=True, **how):
        for choice in chunk.choices:
            assert not choice.delta.content
            for delta in choice.delta.tool_calls or []:
                begun = delta.index in calls[choice.index]
                assert begun == (not delta.id) == (not delta.function.name)
                assert bool(delta.function.arguments) == begun
                found = calls[choice.index].setdefault(delta.index, {"name": "", "arguments": ""})
                found["name"] += delta.function.name or ""
                found["arguments"] += delta.function.arguments or ""
                told += begun
            count[choice.index] += len(choice.logprobs.content) if choice.logprobs else 0
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert told > 2 * sum(map(len, calls))  # in pieces
    for choice, found, end, tokens in zip(whole.choices, calls, ends, count, strict=True):
        made = [c.function.model_dump() for c in choice.message.tool_calls]
        assert list(found.values()) == made
        assert end == choice.finish_reason == "tool_calls"
        assert tokens == len(choice.logprobs.content)


@pytest.mark.parametrize("model", ["tagged", "v31", "bare"])
def test_the_clients_own_joining_gives_the_whole_answer(client: OpenAI, model: str) -> None:
    how: Any = {"model": model, "messages": ASKED, "max_tokens": 900, "seed": 4}
    how |= {"tools": [WEATHER, TIME], "tool_choice": "required"}
    whole = client.chat.completions.create(**how).choices[0].message
    with client.chat.completions.stream(**how) as stream:
        names = [
            event.name for event in stream if event.type == "tool_calls.function.arguments.done"
        ]
        joined = stream.get_final_completion().choices[0].message
    assert names == [call.function.name for call in whole.tool_calls]
    assert [(c.function.name, c.function.arguments) for c in joined.tool_calls] == [
        (c.function.name, c.function.arguments) for c in whole.tool_calls
    ]


def test_one_call_where_only_one_may_come(client: OpenAI) -> None:
    for seed in range(6):
        how: Any = {"tool_choice": "required", "parallel_tool_calls": False, "seed": seed}
        (call,) = ask(client, **how).choices[0].message.tool_calls
        assert call.function.name in ("get_weather", "time")


def test_auto_is_text_or_calls(
    client: OpenAI, handy: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ask(client, max_tokens=20).choices[0]
    assert plain.message.content and not plain.message.tool_calls
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
    held = ask(client, tools=[strict], max_tokens=20).choices[0]
    assert held.message.content and not held.message.tool_calls
    one = '{\\"name\\": \\"time\\", \\"arguments\\": {}}'
    wrong = '{\\"name\\": \\"rm\\", \\"arguments\\": {}}'
    said = f'start: "Wait a <tool\\n<tool_call>{wrong}</tool_call>\\n<tool_call>\\n{one}\\n</tool_call>"'
    monkeypatch.setattr(chat_endpoint, "calls_constraint", lambda *_: Constraint("grammar", said))
    for more in ({}, {"tool_choice": "auto"}):
        message = ask(client, **more).choices[0].message
        assert [call.function.name for call in message.tool_calls] == ["time"]
        assert (
            message.content
            == f"Wait a <tool\n<tool_call>{json.loads(chr(34) + wrong + chr(34))}</tool_call>"
        )
    unread = ask(client, tool_choice="none").choices[0].message
    assert unread.tool_calls is None and unread.content


def test_a_call_that_is_cut_is_text_or_a_cut_call(client: OpenAI) -> None:
    (early,) = ask(client, tool_choice=NAMED, max_tokens=3).choices
    assert early.finish_reason == "length" and not early.message.tool_calls
    assert "<tool_call>".startswith(early.message.content[:11])
    whole = ask(client, tool_choice=NAMED)
    cut = ask(client, tool_choice=NAMED, max_tokens=whole.usage.completion_tokens - 14).choices[0]
    assert cut.finish_reason == "length" and not cut.message.content
    (call,), (made,) = cut.message.tool_calls, whole.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert made.function.arguments.startswith(call.function.arguments) and call.function.arguments


def test_a_conversation_with_tools_is_rendered_as_transformers_does(
    client: OpenAI, handy: Running, tiny: Tiny
) -> None:
    made = ask(client, tool_choice=NAMED).choices[0].message
    called = made.model_dump(exclude_none=True)
    result = {"role": "tool", "tool_call_id": made.tool_calls[0].id, "content": "sunny </s> 晴"}
    messages = [*ASKED, called, result]
    done = ask(client, messages=messages, max_tokens=3)
    assert done.choices[0].message.content

    theirs = AutoTokenizer.from_pretrained(tiny.run / "model", chat_template=QWEN)
    objects = json.loads(json.dumps(called))
    objects["content"] = ""
    for call in objects["tool_calls"]:
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    harmless = json.loads(json.dumps([WEATHER, TIME]).replace("<\\uff5cUser\\uff5c>", ""))
    text = theirs.apply_chat_template(
        [*ASKED, objects, result], tools=harmless, add_generation_prompt=True, tokenize=False
    )
    wanted = theirs.encode(text, add_special_tokens=False)
    sent = ask(client, messages=messages, tools=harmless, max_tokens=1)
    assert sent.usage.prompt_tokens == len(wanted)
    # Names of special tokens in a description are text: they take more tokens than the mark would.
    assert done.usage.prompt_tokens > len(wanted) + 1


@pytest.mark.parametrize("model", ["v3", "v31", "mistral"])
def test_calls_made_before_are_rendered_in_every_form(client: OpenAI, model: str) -> None:
    """DeepSeek's templates join arguments as text; Mistral's want ids of nine letters."""
    made = ask(client, model, tool_choice=NAMED, max_tokens=900).choices[0].message
    result = {"role": "tool", "tool_call_id": made.tool_calls[0].id, "content": "sunny"}
    messages = [*ASKED, made.model_dump(exclude_none=True), result]
    assert ask(client, model, messages=messages, max_tokens=3).choices[0].message.content


@pytest.mark.parametrize(
    "field, more",
    [
        ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "rm"}}}),
        ("tool_choice", {"tool_choice": "required", "tools": []}),
        ("tool_choice", {"tool_choice": "any"}),
        ("tools", {"tools": [TIME, TIME]}),
        ("tools", {"tools": [{"type": "custom", "custom": {"name": "x"}}]}),
        ("tools", {"tools": [{"type": "function", "function": {"name": "a b"}}]}),
        ("tools", {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}),
        ("tools", {"response_format": {"type": "json_object"}}),
        ("messages.1", {"messages": [*ASKED, {"role": "tool", "tool_call_id": "x", "content": "1"}]}),
        ("messages.0", {"messages": [{"role": "user", "content": "x", "tool_call_id": "x"}]}),
        ("arguments", {"messages": [*ASKED, {"role": "assistant", "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "time", "arguments": "[1]"}}]}]}),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(client: OpenAI, field: str, more: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **more)
    assert field in (caught.value.param or "")


def test_a_schema_that_cannot_be_followed_is_a_400(client: OpenAI) -> None:
    impossible = {"type": "object", "properties": {"x": {"type": "nothing"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": impossible}}
    with pytest.raises(openai.BadRequestError):
        ask(client, tools=[tool], tool_choice="required")


@pytest.mark.parametrize(
    "param, more",
    [
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tool_choice": NAMED}),
        ("tools", {"tools": [TIME | {"function": {"name": "f", "strict": True}}]}),
        ("parallel_tool_calls", {"parallel_tool_calls": False}),
    ],
)
def test_arguments_outside_of_json_cannot_be_forced(client: OpenAI, param: str, more: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="cannot be held") as caught:
        ask(client, "coder", **more)
    assert caught.value.param == param and caught.value.code == "tools_unsupported"
    assert ask(client, "coder", max_tokens=3).choices[0].message.content


def test_a_forced_call_may_be_thought_about(client: OpenAI, handy: Running) -> None:
    """The rule that the test above shortens."""
    found = calls_constraint(
        handy.hub.limits,
        Offer(TAGGED, [Function(name="f")]),
        ChatRequest.model_validate({"model": "x", "messages": ASKED, "tool_choice": "required"}),
        True,
    )
    engine = handy.hub.models["thinks"].llm.engine
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    for text, fits in (
        (f"so <tool_call> 好\n</think>\n\n{call}", True),
        (f"</think>{call}\n{call}", True),
        (call, False),
        (f"</think>hi{call}", False),
    ):
        tokenizer = handy.hub.models["thinks"].llm.tokenizer
        matcher = Grammars(tokenizer, engine.bytes_of or []).matcher(found)
        for token in tokenizer.encode(text):
            if not matcher.mask()[token]:
                break
            matcher.wrote(token)
        assert (matcher.error is None and matcher.matcher.is_accepting()) == fits, text


def test_templates_without_tools_say_so(served: Running) -> None:
    reply = served.chat(tools=[TIME])
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "tools_unsupported"


@pytest.mark.parametrize(
    "source, form",
    [
        (QWEN, TAGGED),
        (LLAMA, BARE),
        (V3, FENCED),
        (V31, DEEPSEEK),
        (MISTRAL, LISTED),
        (TEKKEN, LISTED_CLOSELY),
        (MINISTRAL, MARKED),
        (V31.replace("call▁end｜>'", "call▁end｜>\\n   '"), DEEPSEEK),  # careless of white space
        (QWEN_CODER, CODER),
        (GLM_45, GLM),
        (GLM_45.replace("{{ '\\n' }}", ""), GLM),  # 4.7
        *((source, None) for source in UNREAD),
    ],
)
def test_forms_are_known_by_what_templates_write(
    source: str, form: Any, tiny: Tiny, tmp_path: Path
) -> None:
    folder = with_template(tiny.run / "model", tmp_path / "model", source)
    with Template(folder, Tokenizer.load(folder), 0.2) as template:
        assert template.tools and template.tool_format is form
        assert template.calls_in_text == (form in (FENCED, DEEPSEEK))


def test_marks_of_what_a_model_wrote_mean_nothing(tiny: Tiny, tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}a{% generation %}{{ m.content }}{% endgeneration %}b{% endfor %}"
    )
    folder = with_template(tiny.run / "model", tmp_path / "model", source)
    tokenizer = Tokenizer.load(folder)
    with Template(folder, tokenizer, 1.0) as template:
        ids, _ = asyncio.run(template.prompt(ASKED))
    assert ids == tokenizer.encode("a天气b")
