"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any, cast

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from shenhong.errors import ServeError, ShenhongError

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
}


class Fault(Exception):
    """An answer that is an error. `retry_after`: seconds, where trying again may help."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, round(self.retry_after + 0.5)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def bad(message: str, param: str | None = None, code: str | None = None) -> Fault:
    """What the caller sent cannot be honoured."""
    return Fault(400, message, param=param, code=code)


def crashed() -> Fault:
    """Details go to the log and not to the caller."""
    return Fault(500, "the server failed on this request; its log says why")


def stopping() -> Fault:
    return Fault(
        503, "the server is stopping; ask again later", code="server_stopping", retry_after=5
    )


def from_validation(error: RequestValidationError) -> Fault:
    """The complaint of pydantic that says most, naming the field; what was sent is not repeated."""
    # Of a union every branch complains. The one that was meant has the right type and is complained of within.
    first = max(error.errors(), key=lambda e: (not e["type"].endswith("_type"), len(e["loc"])))
    kind, *loc = first["loc"]
    through = _named(loc, error.body, first["type"] == "missing")
    param = ".".join(through if kind == "body" else map(str, loc)) or None
    if first["type"] in ("dict_type", "model_type", "model_attributes_type"):
        if not loc:
            what = "send a JSON object as the body, with Content-Type: application/json"
            return bad(what, None, "invalid_json")
        return bad(f"{param} must be a JSON object", param, "invalid_value")
    if first["type"] == "extra_forbidden":
        return bad(
            f"unknown field {param}; this server refuses what it does not know",
            param,
            "unknown_field",
        )
    if first["type"] == "missing":
        return bad(f"{param or 'the body'} is missing", param, "missing_field")
    if first["type"] == "too_many":
        return bad(f"{param}: {first['msg']}", param, "too_many")
    if first["type"] == "json_invalid":
        return bad("the body is not valid JSON", None, "invalid_json")
    message = str(first["msg"]).removeprefix("Value error, ")
    return bad(f"{param}: {message}" if param else message, param, "invalid_value")


def _named(loc: list[int | str], body: Any, missing: bool) -> Iterator[str]:
    """The steps of a path that lead through the body; those that name branches of a union do not."""
    for number, step in enumerate(loc, 1):
        places = range(len(body)) if isinstance(body, list) else body
        if isinstance(body, dict | list) and step in places:
            body = cast(Any, body)[step]
        elif not (missing and number == len(loc)):
            continue
        yield str(step)


async def on_fault(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Fault)
    return error.response()


async def on_validation(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return from_validation(error).response()


async def on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    fault = Fault(error.status_code, str(error.detail))
    if error.status_code == 405:
        fault = Fault(405, f"this address takes no {request.method}", code="method_not_allowed")
    response = fault.response()
    response.headers.update(error.headers or {})
    return response


async def on_user_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ShenhongError)
    return of_user(error).response()


def of_user(error: ShenhongError) -> Fault:
    """What a caller sent cannot be honoured, or something here cannot be used any more."""
    message = " ".join(str(error).splitlines())
    if isinstance(error, ServeError):
        return Fault(500, message)
    return bad(message, getattr(error, "param", None), getattr(error, "code", None))


async def on_storage(_: Request, error: Exception) -> JSONResponse:
    """A full disk, or damage met after the start."""
    message = f"chats cannot be read or written ({error}); check the disk, then restart the server"
    return Fault(500, message, code="storage").response()


HANDLERS: dict[Any, Any] = {
    Fault: on_fault,
    RequestValidationError: on_validation,
    HTTPException: on_http,
    ShenhongError: on_user_error,
    sqlite3.Error: on_storage,
}
