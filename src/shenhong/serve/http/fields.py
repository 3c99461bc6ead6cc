"""Types of the fields that bodies are made of. A body with a field that it does not have is refused.

What is wrong with a body is told once: each complaint costs a thousand times what the sign did that caused it. So a list
is counted before its items are looked at, its first bad item is its last, and of unknown fields one is enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    StringConstraints,
    ValidationInfo,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from shenhong.serve.settings import Limits


@dataclass(frozen=True)
class Items:
    """How many items of a list or fields of an object. A word: the limit of the server's by that name."""

    most: int | str | None = None
    least: int = 0

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        inner: dict[str, Any] = dict(handler(source))
        if inner["type"] == "list":
            inner["fail_fast"] = True
        if self.least:
            inner["min_length"] = self.least
        if isinstance(self.most, int):
            inner["max_length"] = self.most
        if self.most is None:
            return cast(CoreSchema, inner)
        return core_schema.with_info_before_validator_function(
            self._counted, cast(CoreSchema, inner)
        )

    def _counted(self, given: Any, info: ValidationInfo) -> Any:
        most = self.most
        if isinstance(most, str):
            most = getattr(info.context or Limits(), most)
        if isinstance(given, list | dict) and len(given) > cast(int, most):
            raise PydanticCustomError("too_many", f"more than {most} are not taken")
        return given


Text = Annotated[str, StringConstraints(strict=True)]
Name = Annotated[str, StringConstraints(strict=True, max_length=256)]
TokenId = Annotated[int, Field(strict=True, ge=0, le=2**31)]
Stop = Annotated[str, StringConstraints(strict=True, max_length=256)]
Stops = Annotated[
    list[Annotated[str, StringConstraints(strict=True, min_length=1, max_length=256)]], Items(16)
]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, given: Any) -> Any:
        if not isinstance(given, dict) or len(given) <= len(cls.model_fields):
            return given
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next((name for name in given if name not in known), None)
        return {name: value for name, value in given.items() if name in known or name == unknown}


class SamplingFields(Strict):
    """How tokens are sampled; the same on every endpoint."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(strict=True, ge=0, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, StringConstraints(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            Items(1024),
        ]
        | None
    ) = None  # fmt: skip
    seed: Annotated[int, Field(strict=True, ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | Stops | None = None
