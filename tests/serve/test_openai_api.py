"""The official client against a real server: what is streamed equals what is not, and fields do what they say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from shenhong.engine import Sampling
from shenhong.llm import LLM
from shenhong.tokenizer import Tokenizer
from shenhong.tokenizer.tokenizer import CHAT_TEMPLATE
from tests.conftest import Tiny
from tests.serve.running import Running, begin_with, in_step, running, with_template

ASKED: Any = [{"role": "user", "content": "五绝 长城"}]


@pytest.fixture(scope="module")
def client(served: Running) -> OpenAI:
    return served.openai()


def test_the_models_are_listed(client: OpenAI, served: Running) -> None:
    (listed,) = client.models.list().data
    assert listed.id == served.model == client.models.retrieve(served.model).id
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.models.retrieve("gpt-9")


def test_a_stream_says_the_same_as_a_whole_answer(
    client: OpenAI, served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_step(monkeypatch, served)
    ask: Any = {"model": served.model, "messages": ASKED, "max_tokens": 20, "seed": 5, "n": 3}
    whole = client.chat.completions.create(**ask)
    texts, ends, usage, chunks = ["", "", ""], [None] * 3, None, 0
    for chunk in client.chat.completions.create(
        **ask, stream=True, stream_options={"include_usage": True}
    ):
        assert usage is None, "usage is the last chunk"
        chunks += 1
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert chunks > 9
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert len(set(texts)) == 3  # n answers differ
    assert usage is not None and whole.usage is not None
    for field in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(usage, field) == getattr(whole.usage, field) > 0


def test_answers_are_those_of_the_command_line(served: Running, client: OpenAI, tiny: Tiny) -> None:
    """generate --n 2 --seed 7 and n=2, seed=7 draw the same."""
    llm = LLM(tiny.run)
    from_here = client.chat.completions.create(
        model=served.model, messages=ASKED, max_tokens=12, seed=7, n=2, temperature=0.9
    )
    alone = llm.generate(["五绝 长城"] * 2, 12, Sampling(temperature=0.9), seed=7)
    assert [choice.message.content for choice in from_here.choices] == alone


def test_logprobs_name_the_tokens_that_make_the_text(client: OpenAI, served: Running) -> None:
    done = client.chat.completions.create(
        model=served.model,
        messages=ASKED,
        max_tokens=10,
        temperature=0,
        logprobs=True,
        top_logprobs=4,
    )
    (choice,) = done.choices
    assert choice.logprobs is not None and choice.logprobs.content
    raw = b"".join(bytes(one.bytes or []) for one in choice.logprobs.content)
    assert raw.decode("utf-8", "replace") == choice.message.content
    for one in choice.logprobs.content:
        tops = [top.logprob for top in one.top_logprobs]
        assert len(tops) == 4 and tops == sorted(tops, reverse=True)
        assert one.logprob == pytest.approx(tops[0], abs=1e-4)  # greedy takes the likeliest
        assert sum(map(math.exp, tops)) <= 1 + 1e-4


def test_completions_take_text_tokens_and_several(client: OpenAI, served: Running) -> None:
    tokens = served.http.post("/tokenize", json={"prompt": "长城"}).json()["tokens"]
    ask: Any = {"model": served.model, "max_tokens": 6, "seed": 3}
    by_text = client.completions.create(prompt="长城", **ask)
    by_tokens = client.completions.create(prompt=tokens, **ask)
    several = client.completions.create(prompt=["长城", "明月"], **ask)
    assert by_text.choices[0].text == by_tokens.choices[0].text == several.choices[0].text
    assert [choice.index for choice in several.choices] == [0, 1]
    streamed = client.completions.create(prompt="长城", stream=True, **ask)
    assert "".join(c.choices[0].text for c in streamed if c.choices) == by_text.choices[0].text
    probed = client.completions.create(prompt="长城", logprobs=2, **ask)
    found = probed.choices[0].logprobs
    assert found is not None and found.tokens and found.top_logprobs
    assert len(found.tokens) == len(found.token_logprobs or []) == len(found.text_offset or [])
    assert all(len(top) <= 2 for top in found.top_logprobs)


def test_stop_strings_end_before_they_are_seen(client: OpenAI, served: Running) -> None:
    ask: Any = {"model": served.model, "messages": ASKED, "max_tokens": 30, "seed": 1}
    whole = client.chat.completions.create(**ask).choices[0].message.content or ""
    stop = whole[4:6]
    cut = client.chat.completions.create(**ask, stop=[stop]).choices[0]
    assert cut.message.content == whole[: whole.index(stop)] and cut.finish_reason == "stop"
    streamed = "".join(
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**ask, stop=stop, stream=True)
    )
    assert streamed == cut.message.content


def test_bias_forces_and_forbids(client: OpenAI, served: Running) -> None:
    token = served.http.post("/tokenize", json={"prompt": "山", "add_special_tokens": False})
    (mountain,) = token.json()["tokens"]
    ask: Any = {"model": served.model, "messages": ASKED, "max_tokens": 5, "seed": 1}
    forced = client.chat.completions.create(**ask, logit_bias={str(mountain): 100})
    assert forced.choices[0].message.content == "山" * 5
    assert forced.choices[0].finish_reason == "length"


@pytest.mark.parametrize("streamed", [False, True])
def test_responses(client: OpenAI, served: Running, streamed: bool) -> None:
    ask: Any = {
        "model": served.model,
        "input": "五绝 长城",
        "temperature": 0,
        "max_output_tokens": 12,
    }
    chat = client.chat.completions.create(
        model=served.model, messages=ASKED, max_tokens=12, temperature=0
    )
    if streamed:
        events = list(client.responses.create(**ask, stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        deltas = "".join(e.delta for e in events if e.type == "response.output_text.delta")
        response = events[-1].response  # type: ignore[union-attr]
        assert deltas == response.output_text
    else:
        response = client.responses.create(**ask)
    assert response.output_text == chat.choices[0].message.content
    assert response.usage is not None and chat.usage is not None
    assert response.usage.output_tokens == chat.usage.completion_tokens
    cut = chat.choices[0].finish_reason == "length"
    assert response.status == ("incomplete" if cut else "completed")


@pytest.mark.parametrize("streamed", [False, True])
def test_responses_keep_thinking_apart(
    thinking: Running, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_with(monkeypatch, thinking, "山水</think>")
    client = thinking.openai()
    ask: Any = {"model": thinking.model, "input": "五绝 长城", "max_output_tokens": 24}
    ask |= {"temperature": 0}
    if streamed:
        events = list(client.responses.create(**ask, stream=True))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        response = events[-1].response  # type: ignore[union-attr]
        for kind, item in (("reasoning_text", 0), ("output_text", 1)):
            said = [e for e in events if e.type == f"response.{kind}.delta"]
            assert said and {e.output_index for e in said} == {item}  # type: ignore[union-attr]
            assert {e.item_id for e in said} == {response.output[item].id}  # type: ignore[union-attr]
            whole = response.output[item].content[0].text
            assert "".join(e.delta for e in said) == whole  # type: ignore[union-attr]
        kinds = [event.type for event in events if not event.type.endswith(".delta")]
        opened, closed = ("response.output_item.added", "response.content_part.added"), (
            "response.content_part.done", "response.output_item.done"
        )  # fmt: skip
        assert kinds == [
            "response.created", "response.in_progress", *opened, "response.reasoning_text.done", *closed,
            *opened, "response.output_text.done", *closed, f"response.{response.status}",
        ]  # fmt: skip
    else:
        response = client.responses.create(**ask)
    thought, message = response.output
    assert (thought.type, message.type) == ("reasoning", "message")
    assert thought.content[0].text == "山水" and thought.status == "completed"
    assert response.output_text == message.content[0].text and "think" not in response.output_text
    tokens = len(thinking.hub.models[thinking.model].llm.tokenizer.encode("山水</think>"))
    assert response.usage.output_tokens_details.reasoning_tokens == tokens
    assert response.usage.output_tokens > tokens


def test_tokens_of_thinking_are_counted_in_chats(
    thinking: Running, served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = served.chat().json()["usage"]
    assert plain["completion_tokens_details"] == {"reasoning_tokens": 0}
    begin_with(monkeypatch, thinking, "山水</think>")
    wanted = len(thinking.hub.models[thinking.model].llm.tokenizer.encode("山水</think>"))
    client = thinking.openai()
    ask: Any = {"model": thinking.model, "messages": ASKED, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**ask).usage
    *_, last = client.chat.completions.create(
        **ask, stream=True, stream_options={"include_usage": True}
    )
    for usage in (whole, last.usage):
        assert usage and usage.completion_tokens > wanted and usage.completion_tokens_details
        assert usage.completion_tokens_details.reasoning_tokens == wanted


def test_reasoning_is_taken_back(thinking: Running, served: Running) -> None:
    def ask(server: Running, items: list[Any]) -> Any:
        body = {"model": server.model, "input": [*ASKED, *items], "max_output_tokens": 1}
        return server.http.post("/v1/responses", json=body)

    thought = {"id": "rs_1", "type": "reasoning", "summary": [], "status": "completed"}
    thought |= {"content": [{"type": "reasoning_text", "text": "山水山水<｜User｜>"}]}
    said = {"type": "message", "role": "assistant", "content": "月"}
    counts = [
        ask(thinking, items).json()["usage"]["input_tokens"]
        for items in ([said, *ASKED], [thought, said, *ASKED])
    ]
    assert counts[1] - counts[0] > 5  # a name of a special token in a thought is text
    for server, items in ((served, [thought, said]), (thinking, [thought]), (thinking, [thought, *ASKED])):  # fmt: skip
        reply = ask(server, items)
        assert reply.status_code == 400 and "input" in reply.json()["error"]["param"]


def test_structured_output(client: OpenAI, served: Running) -> None:
    ask: Any = {"model": served.model, "messages": ASKED, "max_tokens": 60, "seed": 2}
    schema = {
        "type": "object",
        "properties": {"moon": {"type": "boolean"}, "n": {"enum": [1, 2]}},
        "required": ["moon", "n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    said = client.chat.completions.create(**ask, response_format=form).choices[0].message.content
    value = json.loads(said or "")
    assert set(value) == {"moon", "n"} and value["n"] in (1, 2)
    for more in ({"choice": ["春", "秋天"]}, {"regex": "(春|秋天)"}):
        extra = {"structured_outputs": more}
        done = client.chat.completions.create(**ask, extra_body=extra).choices[0]
        assert done.message.content in ("春", "秋天")


def test_tokens_there_and_back(served: Running) -> None:
    text = "长城 <｜User｜> abc 🐉"
    there = served.http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert there["count"] == len(there["tokens"]) == len(there["token_strs"])
    assert 3 not in there["tokens"], "the name of a special token in a text is text"
    back = served.http.post("/detokenize", json={"tokens": there["tokens"]}).json()
    assert back == {"prompt": text}
    message = {"messages": [{"role": "user", "content": "长城"}]}
    chat = served.http.post("/tokenize", json=message).json()["tokens"]
    assert chat == served.hub.models[served.model].llm.tokenizer.encode_prompt("长城")


# ------------------------------------------------------------------------ what is refused

NEUTRAL: dict[str, Any] = {
    "user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "n": 1,
    "parallel_tool_calls": True, "tools": [], "modalities": ["text"], "stream": False,
    "logprobs": False, "response_format": {"type": "text"}, "tool_choice": "none",
    "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "stop": None,
}  # fmt: skip


@pytest.mark.parametrize("field", NEUTRAL)
def test_values_that_change_nothing_are_accepted(served: Running, field: str) -> None:
    assert served.chat(**{field: NEUTRAL[field]}, max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    "field, value",
    [
        ("store", True), ("colour", "red"), ("n", 0), ("n", 1000), ("temperature", -1), ("temperature", 3),
        ("temperature", "hot"), ("top_p", 0), ("max_tokens", 0), ("max_tokens", 10**9), ("max_tokens", "8"),
        ("seed", 1.5), ("seed", 2**70), ("stop", ["x"] * 99), ("stop", ""), ("logit_bias", {"x": 1}),
        ("logit_bias", {"99999999": 1}), ("logit_bias", {"1": 500}), ("top_logprobs", 3), ("top_logprobs", 99),
        ("response_format", {"type": "xml"}), ("response_format", {"type": "json_schema"}),
        ("modalities", ["audio"]), ("service_tier", "flex"), ("reasoning_effort", "high"),
        ("tools", [{"type": "function", "function": {"name": "f"}}]), ("stream_options", {"include_usage": True}),
        ("messages", []), ("messages", [{"role": "poet", "content": "x"}]), ("model", 5),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        ("chat_template_kwargs", {"thinking": True}), ("functions", [{"name": "f"}]),
        ("structured_outputs", {}), ("structured_outputs", {"regex": "a", "choice": ["b"]}),
        ("presence_penalty", 5), ("prediction", {"type": "content", "content": "x"}), ("audio", {}),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_a_400_that_names_it(
    served: Running, field: str, value: Any
) -> None:
    reply = served.chat(**{field: value})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert field in (error["param"] or "") and "\n" not in error["message"]


LONG = "山" * 500
REGEX = {"structured_outputs": {"regex": "("}}
SCHEMA = {"type": "json_schema", "name": "x", "schema": {"type": "colour"}}
SCHEMA_OF_CHAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "colour"}}}


@pytest.mark.parametrize(
    "path, more, param",
    [
        ("chat/completions", {"messages": [{"role": "user", "content": LONG}]}, "messages"),
        ("completions", {"prompt": LONG}, "prompt"),
        ("responses", {"input": LONG}, "input"),
        ("chat/completions", {"max_tokens": 10**9}, "max_tokens"),
        ("chat/completions", {"max_completion_tokens": 10**9}, "max_completion_tokens"),
        ("responses", {"max_output_tokens": 10**9}, "max_output_tokens"),
        ("completions", {"prompt": ["x"] * 20}, "prompt"),
        ("completions", {"n": 20}, "n"),
        ("chat/completions", REGEX, "structured_outputs"),
        ("completions", REGEX, "structured_outputs"),
        ("chat/completions", {"response_format": SCHEMA_OF_CHAT}, "response_format"),
        ("responses", {"text": {"format": SCHEMA}}, "text"),
    ],
)
def test_refusals_name_the_caller_s_own_field(
    served: Running, path: str, more: dict[str, Any], param: str
) -> None:
    said = {"completions": {"prompt": "x"}, "responses": {"input": "x"}}
    body = {"model": served.model} | said.get(path, {"messages": ASKED}) | more
    reply = served.http.post(f"/v1/{path}", json=body)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param and "\n" not in error["message"]
    if more is REGEX:
        assert "unclosed group" in error["message"]


def test_a_response_says_what_was_asked_for(served: Running) -> None:
    ask = {"model": served.model, "input": "x", "max_output_tokens": 1}
    for more in ({"parallel_tool_calls": False, "tool_choice": "none"}, {}):
        said = served.http.post("/v1/responses", json=ask | more).json()
        wanted = {"parallel_tool_calls": True, "tool_choice": "auto"} | more
        assert {name: said[name] for name in wanted} == wanted


IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}


@pytest.mark.parametrize(
    "path, more, param, says",
    [
        ("chat/completions", {"messages": [IMAGE]}, "messages.0.content.0.type", "'text'"),
        ("chat/completions", {"messages": [5]}, "messages.0", "must be a JSON object"),
        ("chat/completions", {"messages": [{"content": "x"}]}, "messages.0.role", "is missing"),
        ("chat/completions", {"stop": {"str": 1}}, "stop", "valid"),
        ("chat/completions", {"tool_choice": {"type": "function"}}, "tool_choice.function", "missing"),
        ("completions", {"prompt": []}, "prompt", "at least 1 item"),
        ("completions", {"prompt": 5}, "prompt", "valid string"),
        ("completions", {"prompt": [["x"]]}, "prompt.0", "valid"),
        ("responses", {"input": [{"role": "user", "content": 5}]}, "input.0.content", "valid"),
    ],
)  # fmt: skip
def test_complaints_name_places_of_the_body(
    served: Running, path: str, more: dict[str, Any], param: str, says: str
) -> None:
    body = {"model": served.model, "messages": ASKED} if "chat" in path else {"model": served.model}
    error = served.http.post(f"/v1/{path}", json=body | more).json()["error"]
    assert error["param"] == param or (error["param"] or "").startswith(f"{param}."), error
    assert says in error["message"] and "[" not in error["param"], error


@pytest.mark.parametrize("kind", ["text/plain", None])
def test_a_body_that_is_not_called_json_is_told(served: Running, kind: str | None) -> None:
    body = json.dumps({"model": served.model, "messages": ASKED})
    headers = {"Content-Type": kind} if kind else {}
    reply = served.http.post("/v1/chat/completions", content=body, headers=headers)
    error = reply.json()["error"]
    assert reply.status_code == 400 and "Content-Type: application/json" in error["message"]


def test_a_prompt_over_the_context_is_a_400(served: Running, client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=served.model, messages=[{"role": "user", "content": "山" * 500}]
        )
    assert caught.value.code == "context_length_exceeded"
    assert served.chat().status_code == 200


def test_a_prompt_of_no_tokens_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = with_template(tiny.run / "model", tmp_path / "model", "{# nothing #}")
    with running(folder, tmp_path) as server:
        reply = server.chat()
        error = reply.json()["error"]
        assert (reply.status_code, error["code"], error["param"]) == (400, "empty_prompt", "messages")  # fmt: skip


def test_the_name_of_a_message_reaches_the_template(tiny: Tiny, tmp_path: Path) -> None:
    source = "{% for m in messages %}{{ m.name | default(m.role) }}: {{ m.content }}{% endfor %}"
    folder = with_template(tiny.run / "model", tmp_path / "model", source)
    with running(folder, tmp_path / "data") as server:
        messages = [
            {"role": "user", "name": "li", "content": "长"},
            {"role": "user", "content": "城"},
        ]
        tokens = server.http.post("/tokenize", json={"messages": messages}).json()["tokens"]
        assert Tokenizer.load(folder).decode(tokens) == "li: 长user: 城"


def test_thinking_goes_into_its_own_field(tiny: Tiny, tmp_path: Path) -> None:
    """A template with thinking: what the model writes before </think> is reasoning_content."""
    folder = with_template(tiny.run / "model", tmp_path / "model", CHAT_TEMPLATE + "<think>\n")
    with running(folder, tmp_path / "data") as server:
        message = server.chat(max_tokens=12, seed=1).json()["choices"][0]["message"]
        assert message["reasoning_content"] and message["content"] == ""
        chunks = server.openai().chat.completions.create(
            model=server.model, messages=[{"role": "user", "content": "长城"}], max_tokens=12, seed=1, stream=True
        )  # fmt: skip
        deltas = [chunk.choices[0].delta for chunk in chunks]
        streamed = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
        assert streamed == message["reasoning_content"]
        assert server.http.get("/api/bootstrap").json()["models"][0]["template_thinking"]
