"""What an answer is held to: a response_format, structured_outputs or a format of /v1/responses, within the limits."""

from __future__ import annotations

import json
from typing import Any

from shenhong.engine.request import Constraint
from shenhong.serve.http.faults import bad
from shenhong.serve.http.limits import MOST_MULTIPLE, depth_of_value, multiples_fit
from shenhong.serve.openai.schemas import (
    ChatRequest,
    CompletionRequest,
    ResponseFormat,
    StructuredOutputs,
    TextFormat,
)
from shenhong.serve.settings import Limits


def constraint_of(
    limits: Limits,
    response_format: ResponseFormat | TextFormat | None,
    outputs: StructuredOutputs | None,
) -> Constraint | None:
    """Fault: 400 where a schema is too large or both ways are used."""
    if response_format is not None and response_format.type == "text":
        response_format = None
    if response_format is not None and outputs is not None:
        raise bad(
            "give either response_format or structured_outputs", "structured_outputs", "conflict"
        )
    if outputs is not None:
        return _structured(limits, outputs)
    if response_format is None:
        return None
    if response_format.type == "json_object":
        return Constraint("json", '{"type": "object"}')
    if isinstance(response_format, TextFormat):
        return checked_schema(limits, response_format.schema_ or {"type": "object"}, "text")
    assert response_format.json_schema is not None  # the schema of the body sees to it
    schema = response_format.json_schema.schema_ or {"type": "object"}
    return checked_schema(limits, schema, "response_format")


def _structured(limits: Limits, outputs: StructuredOutputs) -> Constraint:
    if outputs.regex is not None:
        return sized(limits, Constraint("regex", outputs.regex), "structured_outputs")
    if outputs.choice is not None:
        choices = json.dumps(outputs.choice, ensure_ascii=False)
        return _sized(Constraint("choice", choices), limits.max_choice_bytes, "structured_outputs")
    return checked_schema(limits, outputs.json_schema or {}, "structured_outputs")


def response_format_name(body: ChatRequest | CompletionRequest) -> str:
    """The field by which this caller constrains answers, for errors that name it."""
    return "structured_outputs" if body.structured_outputs else "response_format"


def checked_schema(limits: Limits, schema: dict[str, Any], param: str) -> Constraint:
    """Fault: 400 for one that is too large, too deep, or too slow to compile; what is large is looked at no further."""
    constraint = sized(limits, Constraint("json", json.dumps(schema, ensure_ascii=False)), param)
    if depth_of_value(schema) > limits.max_schema_depth:
        raise bad(
            f"the schema nests deeper than {limits.max_schema_depth} levels", param, "schema_depth"
        )
    if not multiples_fit(schema):
        raise bad(
            f"the least common multiple of the schema's multipleOf is over {MOST_MULTIPLE}",
            param,
            "schema_multiple",
        )
    return constraint


def sized(limits: Limits, constraint: Constraint, param: str) -> Constraint:
    """The constraint. Fault: 400 where it is too large."""
    return _sized(constraint, limits.max_schema_bytes, param)


def _sized(constraint: Constraint, most: int, param: str) -> Constraint:
    if len(constraint.value.encode("utf-8", "surrogatepass")) > most:
        raise bad(
            f"what may be written is described in over {most} bytes",
            param,
            "schema_size",
        )
    return constraint
