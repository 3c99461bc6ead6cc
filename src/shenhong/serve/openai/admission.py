"""What every call that has text generated begins with."""

from __future__ import annotations

from fastapi import Request

from shenhong.serve.http.faults import bad
from shenhong.serve.hub import Hub, Served, hub_of, owner_of
from shenhong.serve.openai.schemas import Generating


def admit(request: Request, body: Generating) -> tuple[Hub, str, Served]:
    """Count the request, find its model, and refuse stream_options without a stream. Errors: Fault."""
    hub, owner = hub_of(request), owner_of(request)
    hub.meter.request(owner)
    model = hub.model(body.model)
    if body.stream_options and not body.stream:
        raise bad("stream_options belong to stream: true", "stream_options", "conflict")
    return hub, owner, model
