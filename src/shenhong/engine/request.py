"""What is asked of the engine and what it answers: requests in, events out.

A request is checked against its model when it is submitted; the numbers of ``Sampling`` are checked when it is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from shenhong.errors import RequestError

Finish = Literal["stop", "length", "cancelled", "error"]

# The most alternatives a request may ask to see beside each token.
MOST_LOGPROBS = 20


def _within(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise RequestError(f"{name} is {value}; it must lie between {low:g} and {high:g}")


@dataclass(frozen=True)
class Sampling:
    """How to draw. Temperature 0 takes the likeliest token; the limits apply in the order top-k, top-p, min-p.

    Before them come the penalties and the bias. ``repetition_penalty`` divides the positive and multiplies the
    negative logits of tokens in prompt or answer (Keskar et al. 2019); ``presence_penalty`` is taken off once and
    ``frequency_penalty`` per occurrence for tokens of the answer; ``logit_bias`` is added, token by token.
    """

    temperature: float = 0.8
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise RequestError(f"temperature is {self.temperature}; it must be 0 or more")
        if self.top_k < 0:
            raise RequestError(f"top_k is {self.top_k}; it must be 0 (no limit) or more")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p}; it must lie above 0 and at most 1")
        if not 0 <= self.min_p < 1:
            raise RequestError(f"min_p is {self.min_p}; it must be 0 or more and below 1")
        _within("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _within("presence_penalty", self.presence_penalty, -2, 2)
        _within("frequency_penalty", self.frequency_penalty, -2, 2)
        for token, bias in self.logit_bias.items():
            _within(f"logit_bias of token {token}", bias, -100, 100)

    @property
    def plain(self) -> bool:
        """Whether the model's logits are drawn from as they are, whatever was written before."""
        return (
            self.repetition_penalty == 1
            and self.presence_penalty == self.frequency_penalty == 0
            and not self.logit_bias
        )


@dataclass(frozen=True)
class Constraint:
    """The only texts allowed: ``value`` is a JSON schema, a regular expression, a JSON list of strings, or a grammar.

    A grammar is written as llguidance writes them (Lark, with ``%json`` rules).
    """

    kind: Literal["json", "regex", "choice", "grammar"]
    value: str


@dataclass(frozen=True)
class Request:
    """One text to write. ``seed`` names the request's own stream of draws."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    stop_tokens: tuple[int, ...] | None = None  # None: the model's eos
    stop: tuple[str, ...] = ()  # a text that comes to hold one of these ends before it
    logprobs: int | None = None  # k: of the chosen token and of the k likeliest
    constraint: Constraint | None = None
    priority: int = 0  # the higher the sooner
    owner: str = ""  # a prefix in the cache is shared with requests of the same owner only


class TokenLogprob(NamedTuple):
    """Natural logarithms of the model's own probabilities, before penalties, temperature and limits."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Usage(NamedTuple):
    prompt_tokens: int
    completion_tokens: int  # those of the events; a stop token is not among them
    cached_tokens: int  # of the prompt, found in the cache


class Event(NamedTuple):
    """Something new about one request."""

    request: int
    tokens: list[int]
    text: str  # whole characters only; what may become a stop string is held back
    logprobs: list[TokenLogprob]
    finish: Finish | None = None
    error: str | None = None
    usage: Usage | None = None  # with the finish


class EngineStats(NamedTuple):
    running: int
    waiting: int
    pages: int
    pages_free: int  # those that hold a reusable prefix among them
    pages_cached: int
    prompt_tokens: int  # totals since the start
    generated_tokens: int
    prefix_hits: int  # prompt tokens found in the cache
    preemptions: int
    drafted: int
    accepted: int

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that were kept."""
        return self.accepted / self.drafted if self.drafted else None
