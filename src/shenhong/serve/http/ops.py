"""/health and /metrics, for those who watch the server."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse

from shenhong.serve.hub import hub_of

router = APIRouter()


@router.get("/health")
@router.head("/health", include_in_schema=False)
async def health(request: Request) -> JSONResponse:
    """200 while answers are given, 503 while the server stops or where a model has failed for good."""
    hub = hub_of(request)
    failed = any(model.thread.failed for model in hub.models.values())
    status = "stopping" if hub.draining else "failed" if failed else "ok"
    state: dict[str, Any] = {
        "status": status,
        "models": list(hub.models),
        "answering": hub.answering(),
    }
    return JSONResponse(state, 200 if status == "ok" else 503)


@router.get("/metrics")
async def metrics(request: Request) -> PlainTextResponse:
    """In Prometheus' text format."""
    hub = hub_of(request)
    page = _Page()
    page.add("uptime_seconds", "gauge", "since the server began", time.time() - hub.started)
    for (kind, name), count in sorted(c for c in hub.counts.items() if c[0][0] == "answers"):
        page.add(f"{kind}_total", "counter", "answers that ended", count, model=name)
    for key, count in sorted(c for c in hub.counts.items() if c[0][0] == "responses"):
        page.add("http_responses_total", "counter", "responses by status", count, status=key[1])
    for model in hub.models.values():
        stats, name = model.thread.stats, model.id
        for field, kind, what in (
            ("running", "gauge", "answers being written"),
            ("waiting", "gauge", "answers waiting"),
            ("pages", "gauge", "pages of the cache"),
            ("pages_free", "gauge", "pages nobody holds"),
            ("pages_cached", "gauge", "pages kept as reusable prefixes"),
            ("prompt_tokens", "counter", "tokens read"),
            ("generated_tokens", "counter", "tokens written"),
            ("prefix_hits", "counter", "prompt tokens found in the cache"),
            ("preemptions", "counter", "answers put back into the queue"),
            ("drafted", "counter", "tokens drafted"),
            ("accepted", "counter", "drafted tokens that were kept"),
        ):
            suffix = "_total" if kind == "counter" else ""
            page.add(f"{field}{suffix}", kind, what, getattr(stats, field), model=name)
        failures = model.thread.failures
        page.add("engine_failures_total", "counter", "steps that failed", failures, model=name)
    return PlainTextResponse(page.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


class _Page:
    """Samples of one measure stand together under one head, as the format wants."""

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = {}

    def add(self, name: str, kind: str, what: str, value: float, **labels: str) -> None:
        name = f"shenhong_{name}"
        head = [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]
        quoted = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        shown = f"{name}{{{quoted}}}" if quoted else name
        self._lines.setdefault(name, head).append(f"{shown} {value}")

    def text(self) -> str:
        return "\n".join(line for lines in self._lines.values() for line in lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
