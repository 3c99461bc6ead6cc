"""What a server is started with: where it listens, who may ask, and how much one caller may ask for."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch


def setting(default: Any, help: str) -> Any:
    """A limit with its default and the words that explain it on the command line."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Limits:
    """What one request, one key and one queue may hold; each is a flag of `serve` of the same name."""

    max_body_bytes: int = setting(2**20, "largest request body")
    max_import_bytes: int = setting(2**24, "largest chat that may be imported")
    max_json_depth: int = setting(64, "deepest nesting of a request body")
    max_messages: int = setting(1024, "most messages of one request")
    max_prompt_tokens: int = setting(131_072, "longest prompt; the model's context if that is less")
    max_output_tokens: int = setting(8192, "longest answer, in tokens")
    max_n: int = setting(16, "most answers to one request")
    max_schema_bytes: int = setting(65_536, "largest JSON schema or regex")
    max_choice_bytes: int = setting(2**19, "largest list of choices")
    max_schema_depth: int = setting(32, "deepest nesting of a JSON schema")
    max_queue: int = setting(256, "answers running or waiting per model; more are refused with 429")
    requests_per_minute: int = setting(600, "requests a minute and key, where keys are set")
    tokens_per_minute: int = setting(
        1_000_000, "tokens read and written a minute and key, where keys are set"
    )
    max_chats: int = setting(10_000, "most chats kept for one key")
    max_chat_bytes: int = setting(2**25, "largest chat")
    max_kept_bytes: int = setting(2**30, "most bytes of all chats kept for one key")
    max_reading_bytes: int = setting(2**26, "most bytes of chats being sent to one key at once")
    max_streams: int = setting(64, "most event streams of the page to one key at once")
    template_seconds: float = setting(2.0, "longest time a chat template may take")
    slow_head_seconds: float = setting(10.0, "longest time the head of a request may take to come")
    slow_reader_seconds: float = setting(
        30.0, "a caller who sends or takes nothing so long is let go"
    )


@dataclass(frozen=True)
class Settings:
    """host, port: where to listen; port 0 takes a free one. keys: who may ask; empty: everyone on loopback.

    data: folder of the chat database. runs: folder whose runs are shown, or None. drain_seconds: how long answers
    may go on after SIGTERM. allow_hosts: further names under which the server may be addressed.
    behind_proxy: every request comes through a proxy that speaks TLS, whose X-Forwarded headers are believed.
    dtype: what weights and caches are kept in, "auto" as ``LLM`` has it.
    draft: tokens a model guesses ahead of itself; None measures what is fastest here. Answers are the same either way.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    data: Path | None = None
    runs: Path | None = None
    drain_seconds: float = 20.0
    allow_hosts: tuple[str, ...] = ()
    behind_proxy: bool = False
    dtype: torch.dtype | Literal["auto"] = "auto"
    draft: int | None = None
    limits: Limits = field(default_factory=Limits)


def default_data() -> Path:
    """$XDG_DATA_HOME/shenhong, by default ~/.local/share/shenhong."""
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(home) / "shenhong"
