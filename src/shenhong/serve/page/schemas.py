"""What the page sends: turns, changes of chats, and chats that were exported before."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union

from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from shenhong import domains
from shenhong.serve.http.fields import Items, Name, SamplingFields, Strict, Text

PART_FIELDS = 100


class TurnSettings(SamplingFields):
    """`plain`: the texts of the branch are one document, which is gone on with as it stands, asked by no template."""

    max_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    plain: Annotated[bool, Field(strict=True)] | None = None


class Target(Strict):
    model: Name
    settings: TurnSettings = TurnSettings()


class TurnRequest(Strict):
    parent: Name | None = None
    text: Annotated[str, StringConstraints(strict=True, min_length=1)] | None = None
    options: Annotated[dict[Name, Name], Items(16)] = Field({})  # chosen beside the text
    targets: Annotated[list[Target], Items(4, least=1)]

    @model_validator(mode="after")
    def answers_something(self) -> TurnRequest:
        if self.text is None and self.parent is None:
            raise ValueError("give text, or the user message to answer again as parent")
        return self


class KeptText(Strict):
    parent: Name | None = None
    text: Annotated[str, StringConstraints(strict=True, min_length=1)]


class ChatNew(Strict):
    title: Annotated[str, StringConstraints(max_length=200)] | None = None


class ChatChange(Strict):
    title: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None
    leaf: Name | None = None


class Login(Strict):
    key: Annotated[str, StringConstraints(strict=True, max_length=1024)]


class PlainPart(Strict):
    type: Literal["text", "reasoning"]
    text: Text


class ErrorPart(Strict):
    type: Literal["error"]
    message: Text


def few_fields(part: Any) -> Any:
    """The part, whose classes are a domain's own, so that they do not count what they do not know."""
    level = [part]
    while level:
        item = level.pop()
        if isinstance(item, dict) and len(item) > PART_FIELDS:
            raise PydanticCustomError("too_many", f"more than {PART_FIELDS} fields are not taken")
        if isinstance(item, dict | list):
            level += item.values() if isinstance(item, dict) else item
    return part


# A part of an answer as a domain sets it is checked by the domain's own class.
_PARTS = (
    PlainPart,
    ErrorPart,
    *filter(None, (domains.domain(name).Part for name in domains.names())),
)
Part = Annotated[
    Union[_PARTS],  # type: ignore[valid-type]  # noqa: UP007
    Discriminator("type"),
    BeforeValidator(few_fields),
]


class Usage(Strict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Annotated[dict[Name, int], Items(16)] = Field({})
    completion_tokens_details: Annotated[dict[Name, int], Items(16)] = Field({})


class Timing(Strict):
    first_token_ms: float
    tokens_per_second: float


class ImportedMessage(Strict):
    """As the store keeps messages: what is let in here the page must be able to draw."""

    id: Name
    chat: Name | None = None
    parent: Name | None
    role: Literal["user", "assistant"]
    parts: Annotated[list[Part], Items(100)]
    model: Name | None = None
    settings: TurnSettings | None = None
    job: Name | None = None
    state: Literal["done", "running", "stopped", "error"] = "done"
    created: float = 0
    usage: Usage | None = None
    timing: Timing | None = None


class ImportedChat(Strict):
    id: Name | None = None
    title: Annotated[str, StringConstraints(max_length=200)] = ""
    created: float = 0
    updated: float = 0
    leaf: Name | None = None
    messages: Annotated[list[ImportedMessage], Items(5000)]
    format: Literal["shenhong-chat-1"] | None = None
