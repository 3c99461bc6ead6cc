"""A request under way: what was asked, where its text stands, and what decides about the next token."""

from __future__ import annotations

import torch

from shenhong.engine.request import Request, Usage
from shenhong.engine.sampler import COLD, Penalties, samplings, uniforms
from shenhong.engine.scheduler import Sequence
from shenhong.engine.structured import Matcher
from shenhong.engine.text import TextStream


class RunningRequest:
    """A request under way."""

    def __init__(
        self, request: Request, sequence: Sequence, stops: set[int], max_new_tokens: int
    ) -> None:
        self.request, self.sequence, self.stops = request, sequence, stops
        self.max_new_tokens = max_new_tokens
        # Where the likeliest is taken no number is needed.
        greedy = request.sampling.temperature < COLD
        numbers = (
            torch.zeros(max_new_tokens) if greedy else uniforms([request.seed], max_new_tokens)[0]
        )
        self.samplings = samplings(request.sampling, numbers)
        self.stream: TextStream | None = None
        self.penalties: Penalties | None = None
        self.matcher: Matcher | None = None
        self.written = 0

    @property
    def plain(self) -> bool:
        """Whether the next token is drawn from the model's logits as they are, and nothing else is asked of them."""
        return self.penalties is None and self.matcher is None and self.request.logprobs is None

    def usage(self) -> Usage:
        return Usage(len(self.request.prompt), self.written, self.sequence.cached)
