"""How bodies become what routes are given, and where work is done whose length a caller chooses.

A body that is large is parsed and checked in another thread, so that others are answered meanwhile.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar, cast

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError

from shenhong.serve.http.faults import Fault, from_validation
from shenhong.serve.hub import hub_of

P = ParamSpec("P")
R = TypeVar("R")

LARGE = 16_384  # bytes; what is smaller takes less time than changing threads under load


async def aside(size: int, function: Callable[P, R], *args: P.args, **more: P.kwargs) -> R:
    """What the function returns, called in another thread where it is given much."""
    if size > LARGE:
        return await asyncio.to_thread(function, *args, **more)
    return function(*args, **more)


async def size_of(request: Request) -> int:
    return len(await request.body())


class CheckedRoute(APIRoute):
    """A route whose body is checked here, with the limits of the server, and not by FastAPI on the event loop."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        adapter = TypeAdapter(cast(Any, self.body_field.field_info.annotation))

        async def checked(request: Request) -> Response:
            try:
                return await handle(_Checked(request, adapter))
            except _Refused as refused:
                raise refused.fault from None

        return checked


class _Refused(HTTPException):
    """The one kind of error that FastAPI lets through where a body is parsed."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.status)
        self.fault = fault


class _Checked(Request):
    """FastAPI takes a model that is one already as it is."""

    def __init__(self, request: Request, adapter: TypeAdapter[Any]) -> None:
        super().__init__(request.scope, request.receive)
        self.adapter = adapter

    async def json(self) -> Any:
        body = await self.body()
        return await aside(len(body), self._read, body)

    def _read(self, body: bytes) -> Any:
        value = json.loads(body)
        if value is None:
            return None
        try:
            return self.adapter.validate_python(value, context=hub_of(self).limits)
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False)
            errors = [fault | {"loc": ("body", *fault["loc"])} for fault in found]
            raise _Refused(from_validation(RequestValidationError(errors, body=value))) from None
