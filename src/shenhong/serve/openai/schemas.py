"""What callers may send, field by field. Unknown fields are refused; `Neutral` fields may only say what we do anyway.

A field that is here works. A field of OpenAI's specification that cannot be honoured is typed as the one value that
changes nothing (`store: false`, `modalities: ["text"]`), so that any other value is a 400 that names it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag, model_validator

from shenhong.serve.http.fields import Items, Name, SamplingFields, Strict, Text, TokenId

PARTS = 1024  # most of one message


class StructuredOutputs(Strict):
    """Exactly one of them; only texts that match it are written."""

    json_schema: dict[str, Any] | None = Field(None, alias="json")
    regex: Annotated[str, StringConstraints(strict=True, min_length=1)] | None = None
    choice: Annotated[list[Text], Items(10_000, least=1)] | None = None

    @model_validator(mode="after")
    def one(self) -> StructuredOutputs:
        if sum(v is not None for v in (self.json_schema, self.regex, self.choice)) != 1:
            raise ValueError("give exactly one of json, regex and choice")
        return self


class SchemaFormat(Strict):
    name: Name = "schema"
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    @model_validator(mode="after")
    def fits(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type json_schema, and that needs it")
        return self


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class Neutral(Strict):
    """Fields at values that change nothing here."""

    user: Text | None = None
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory"] | None = None


class Generating(Neutral):
    """What every request for text begins with."""

    model: Name
    stream: Annotated[bool, Field(strict=True)] | None = None
    stream_options: StreamOptions | None = None


class TextPart(Strict):
    type: Literal["text", "input_text", "output_text"]
    text: Text
    annotations: Annotated[list[Any], Items(0)] | None = None
    logprobs: Annotated[list[Any], Items(0)] | None = None


class CalledFunction(Strict):
    name: Name
    arguments: Text


class ToolCall(Strict):
    """A call the model made earlier."""

    id: Name
    type: Literal["function"] = "function"
    function: CalledFunction


class Function(Strict):
    """`parameters`: a JSON schema of an object; none: the function takes no arguments."""

    name: Annotated[str, StringConstraints(strict=True, pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class ChosenFunction(Strict):
    name: Name


class NamedChoice(Strict):
    """This function must be called."""

    type: Literal["function"]
    function: ChosenFunction


class ChatMessage(Strict):
    """`content` may be text parts; they are joined."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Items(PARTS)] | None = None
    name: Name | None = None
    reasoning_content: Text | None = None
    refusal: None = None
    audio: None = None
    annotations: Annotated[list[Any], Items(0)] | None = None
    function_call: None = None
    tool_calls: Annotated[list[ToolCall], Items(128)] | None = None
    tool_call_id: Name | None = None


class ChatRequest(SamplingFields, Generating):
    messages: Annotated[list[ChatMessage], Items("max_messages", least=1)]
    max_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    n: Annotated[int, Field(strict=True, ge=1)] | None = None
    logprobs: Annotated[bool, Field(strict=True)] | None = None
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    chat_template_kwargs: Annotated[dict[Name, bool | int | str], Items(64)] | None = None
    tools: Annotated[list[Tool], Items(128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Items(1)] | None = None
    reasoning_effort: None = None
    verbosity: Literal["medium"] | None = None
    prediction: None = None
    audio: None = None
    web_search_options: None = None
    functions: Annotated[list[Any], Items(0)] | None = None
    function_call: Literal["none"] | None = None


class CompletionRequest(SamplingFields, Generating):
    prompt: (
        Text
        | Annotated[list[TokenId], Items(least=1)]
        | Annotated[list[Text], Items(least=1)]
        | Annotated[list[Annotated[list[TokenId], Items(least=1)]], Items(least=1)]
    )
    max_tokens: Annotated[int, Field(strict=True, ge=1)] | None = 16
    n: Annotated[int, Field(strict=True, ge=1)] | None = None
    logprobs: Annotated[int, Field(strict=True, ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: None = None


class InputMessage(Strict):
    """A message of /v1/responses; those that came out of it may be sent back in."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Items(PARTS)]
    id: Name | None = None
    status: Literal["completed", "incomplete", "in_progress"] | None = None
    phase: Name | None = None


class ReasoningText(Strict):
    type: Literal["reasoning_text"]
    text: Text


class ReasoningItem(Strict):
    """Earlier thinking of /v1/responses, before the assistant's message it led to."""

    type: Literal["reasoning"]
    content: Annotated[list[ReasoningText], Items(PARTS)] | None = None
    summary: Annotated[list[Any], Items(0)] | None = None
    encrypted_content: None = None
    id: Name | None = None
    status: Literal["completed", "incomplete", "in_progress"] | None = None


def _kind(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return "reasoning" if kind == "reasoning" else "message"


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")] | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Name = "schema"
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Strict):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesRequest(Generating):
    input: Text | Annotated[list[InputItem], Items("max_messages", least=1)]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    text: TextOptions | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    tools: Annotated[list[Any], Items(0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Literal[0] | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None
    include: Annotated[list[Any], Items(0)] | None = None
    reasoning: None = None


class TokenizeRequest(Strict):
    """Give `prompt` or `messages`."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Items("max_messages", least=1)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Strict):
    model: Name | None = None
    tokens: Annotated[list[TokenId], Items()]
