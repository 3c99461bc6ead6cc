"""The engine: requests are submitted, every step writes the next token of many, events tell what is new.

One paged cache, one scheduler, one model. ``generate`` and ``stream`` are a loop around the same steps. Not
thread-safe: one thread owns an engine.

What a request gets does not depend on what else is in the batch, on how prompts were cut into steps, or on whether it
had to give up its place for a while: with the kernels to the bit, in fp32 as in bf16; with plain PyTorch except where
two candidates are nearly as likely (rounding). Its draws come from its own stream, token t from number t.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shenhong.engine.ahead import Continued, Writer
from shenhong.engine.cache import Pages, lay_out
from shenhong.engine.live import Live
from shenhong.engine.request import (
    MOST_LOGPROBS,
    Constraint,
    EngineStats,
    Event,
    Finish,
    Request,
    Sampling,
    TokenLogprob,
)
from shenhong.engine.sampler import Penalties, draw, log_probabilities, request_seed
from shenhong.engine.scheduler import Part, Scheduler
from shenhong.engine.scheduler import Sequence as Text
from shenhong.engine.speculate import Drafter, DraftReport, Followed
from shenhong.engine.structured import Grammars, Matcher
from shenhong.engine.text import TextStream, token_bytes
from shenhong.errors import RequestError
from shenhong.model import Decoder, PreparedDecoder
from shenhong.tokenizer import Tokenizer


@dataclass(frozen=True)
class EngineSettings:
    """What an engine may use."""

    page: int = 16  # tokens of a page
    cache_bytes: int = 512 << 20  # of all layers; at least one text of full length always fits
    step_tokens: int = 512  # of prompts and answers together
    most_running: int = 256  # texts under way at once; more wait
    share_prefixes: bool = True
    draft: int = 0  # tokens guessed ahead by the multi-token-prediction layer; see ``calibrate``
    most_drafting: int = 2  # no guesses while more texts are under way


class Completion(NamedTuple):
    """What was written after one prompt; a stop token ends it and is not part of it."""

    tokens: list[int]
    finish: Literal["stop", "length"]


class Engine:
    """Generates from a decoder's weights as they are now.

    ``tokenizer``: needed for text, stop strings and constraints. ``dtype``: what weights and cache are kept in. ``take``:
    the decoder gives its weights up to the engine, which halves the memory it takes to start.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer | None = None,
        dtype: torch.dtype = torch.float32,
        settings: EngineSettings = EngineSettings(),
        take: bool = False,
    ) -> None:
        self.model = PreparedDecoder(decoder, dtype, take)
        self.config, self.tokenizer, self.settings = decoder.config, tokenizer, settings
        self.bytes_of = token_bytes(tokenizer, self.config.vocab_size) if tokenizer else None
        context, page = self.config.max_position_embeddings, settings.page
        row_bytes = sum(self.model.rows) * torch.tensor([], dtype=dtype).element_size()
        pages = settings.cache_bytes // (row_bytes * page)
        # More than every running text could fill is of no use.
        pages = min(pages, settings.most_running * -(-context // page))
        self.pages = Pages(max(pages, -(-context // page)))
        self.pools = self.model.new_pools(self.pages.count, page)
        self.scheduler = Scheduler(self.pages, page, settings.step_tokens, settings.most_running)
        self.writer = Writer(self.model, self.pools, self.scheduler)
        self.drafter: Drafter | None = None
        if self.model.join is not None:
            self.drafter = Drafter(self.model, self.pools, self.scheduler, settings.most_drafting)
            self.drafter.depth = settings.draft
        self.grammars: Grammars | None = None  # made when the first constraint comes
        self.live: dict[int, Live] = {}
        self.ended: list[Event] = []  # cancelled, to be told with the next step
        self.told: list[Event] = []  # of other requests, met while ``generate`` or ``stream`` ran
        self.inboxes: dict[int, list[Event]] = {}  # of ``generate`` and ``stream``
        self.submitted = self.prompt_tokens = self.generated_tokens = 0

    # ---------------------------------------------------------------- requests

    def submit(self, request: Request, matcher: Matcher | None = None) -> int:
        """Queues a request and returns its id. ``RequestError`` for the impossible.

        ``matcher``: what ``compiled`` made of the request's constraint, for this text alone.
        """
        self._check(request)
        if matcher is None and request.constraint is not None:
            matcher = self.compiled(request.constraint)
        self.submitted += 1
        text = Text(
            self.submitted,
            list(request.prompt),
            request.priority,
            shareable=self.settings.share_prefixes,
            root=request.owner.encode(),
        )
        live = Live(request, text, self._stops(request), self._room(request))
        if self.bytes_of is not None:
            live.stream = TextStream(self.bytes_of, request.stop)
        if not request.sampling.plain:
            live.penalties = Penalties(request.sampling, request.prompt, self.config.vocab_size)
        if matcher:
            live.matcher, live.stops = matcher, live.stops | self._eos()
        self.live[text.id] = live
        self.scheduler.add(text)
        self.prompt_tokens += len(request.prompt)
        return text.id

    def cancel(self, id: int) -> None:
        """Ends a request and frees its pages at once; the event comes with the next step. Unknown ids are ignored."""
        if live := self.live.get(id):
            self.ended.append(self._event(live, [], [], "cancelled"))

    @property
    def busy(self) -> bool:
        return bool(self.live or self.ended or self.told)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            pages=self.pages.count,
            pages_free=self.pages.free,
            pages_cached=len(self.pages.idle),
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            prefix_hits=self.scheduler.prefix_hits,
            preemptions=self.scheduler.preemptions,
            drafted=self.drafter.drafted if self.drafter else 0,
            accepted=self.drafter.accepted if self.drafter else 0,
        )

    # ---------------------------------------------------------------- a step

    def step(self) -> list[Event]:
        """Computes the next tokens of some requests and tells what is new about them."""
        told, self.told = self.told, []
        return told + self._advance()

    def _advance(self) -> list[Event]:
        events, self.ended = self.ended, []
        if parts := self.scheduler.plan():
            events += self._write_ahead(parts) if self._plain(parts) else self._compute(parts)
        told: list[Event] = []
        for event in events:
            inbox = self.inboxes.get(event.request)
            (told if inbox is None else inbox).append(event)
        return told

    def _plain(self, parts: list[Part]) -> bool:
        if self.drafter and self.drafter.depth and len(parts) <= self.drafter.most_running:
            return False
        return self.model.fused is not None and all(
            not part.drafts and self.live[part.sequence.id].plain for part in parts
        )

    def _write_ahead(self, parts: list[Part]) -> list[Event]:
        lives = [self.live[part.sequence.id] for part in parts]
        written = self.writer.write(
            [
                Continued(part, live.draws[live.written if part.whole else live.room :], live.stops)
                for part, live in zip(parts, lives, strict=True)
            ]
        )
        return [
            self._write(live, tokens) for live, tokens in zip(lives, written, strict=True) if tokens
        ]

    def _compute(self, parts: list[Part]) -> list[Event]:
        before = [part.sequence.computed for part in parts]
        states_ND = self.model.forward(lay_out(part.laid for part in parts), self.pools)
        rows: list[int] = []  # whose next token is drawn
        whole: list[tuple[Live, list[int]]] = []  # with the guesses that are checked
        begin = 0
        for part in parts:
            sequence, length, drafts = part
            begin += length
            guesses, sequence.drafts = sequence.drafts[:drafts], []
            if part.whole:
                rows += range(begin - drafts - 1, begin)
                whole.append((self.live[sequence.id], guesses))
            self.scheduler.done(sequence, length - drafts)
        events = self._continue(whole, states_ND, rows) if whole else []
        if self.drafter and self.drafter.depth:
            self._follow_up(parts, before, states_ND)
        return events

    def _continue(
        self, whole: list[tuple[Live, list[int]]], states_ND: Tensor, rows: list[int]
    ) -> list[Event]:
        """Draws behind every text and every guess, and keeps the guesses that were drawn too."""
        if len(rows) < len(states_ND):
            states_ND = states_ND[torch.tensor(rows)]
        logits_BV = self.model.logits(states_ND)
        drawn = self._draw(logits_BV, [(live, i) for live, g in whole for i in range(len(g) + 1)])
        events, row = [], 0
        for live, guesses in whole:
            tokens = drawn[row : row + len(guesses) + 1]
            kept = 0
            while kept < len(guesses) and guesses[kept] == tokens[kept]:
                kept += 1
            if self.drafter:
                self.drafter.accepted += kept
            events.append(self._write(live, tokens[: kept + 1], logits_BV[row:]))
            row += len(guesses) + 1
        return events

    def _follow_up(self, parts: list[Part], before: list[int], states_ND: Tensor) -> None:
        assert self.drafter is not None
        steps, row = [], 0
        for (sequence, length, _), first in zip(parts, before, strict=True):
            if live := self.live.get(sequence.id):
                plain = live.penalties is None and live.matcher is None
                steps.append(
                    Followed(
                        sequence,
                        first,
                        row,
                        live.draws[live.written :],
                        plain and sequence.pending == 1,
                    )
                )
            row += length
        self.drafter.follow(steps, states_ND)

    def _draw(self, logits_BV: Tensor, places: list[tuple[Live, int]]) -> list[int | None]:
        """For each (text, i) its token number i from now; None where the model's numbers are not finite."""
        changed = [i for i, (live, _) in enumerate(places) if live.penalties or live.matcher]
        if changed:
            logits_BV = logits_BV.clone()
        for i in changed:
            live = places[i][0]
            if live.penalties:
                logits_BV[i] = live.penalties.apply(logits_BV[i])
            if live.matcher:
                logits_BV[i].masked_fill_(~live.matcher.mask(), float("-inf"))
        return draw(logits_BV, np.stack([live.draws[live.written + i] for live, i in places]))

    def _write(
        self, live: Live, tokens: list[int | None], logits_BV: Tensor | None = None
    ) -> Event:
        """Takes over what was drawn (from these logits' rows, where somebody asks for them), up to where the text
        ends. All but the last token are in the cache."""
        new: list[int] = []
        logprobs: list[TokenLogprob] = []
        text = ""
        finish: Finish | None = None
        for number, token in enumerate(tokens):
            if token is None:
                return self._event(live, new, logprobs, "error", text, "the model gave no number")
            if token in live.stops:
                finish = "stop"
                break
            new.append(token)
            live.text.tokens.append(token)
            live.written += 1
            if live.penalties:
                live.penalties.wrote(token)
            if live.matcher:
                live.matcher.wrote(token)
                if error := live.matcher.error:
                    return self._event(live, new, logprobs, "error", text, error)
            if logits_BV is not None and live.request.logprobs is not None:
                logits_V = logits_BV[number]
                logprobs.append(log_probabilities(logits_V, token, live.request.logprobs))
            if live.stream:
                text += live.stream.add(token)
                if live.stream.stopped:
                    finish = "stop"
                    break
            if live.matcher and live.matcher.complete:
                finish = "stop"
                break
            if live.written == live.room:
                finish = "length"
                break
        self.scheduler.done(live.text, number)
        self.generated_tokens += len(new)
        return self._event(live, new, logprobs, finish, text)

    def _event(
        self,
        live: Live,
        tokens: list[int],
        logprobs: list[TokenLogprob],
        finish: Finish | None,
        text: str = "",
        error: str | None = None,
    ) -> Event:
        """Where it is the last one, the request leaves and its pages are free."""
        if finish is None:
            return Event(live.text.id, tokens, text, logprobs)
        if live.stream:
            text += live.stream.finish()
        self.scheduler.remove(live.text)
        del self.live[live.text.id]
        return Event(live.text.id, tokens, text, logprobs, finish, error, live.usage())

    # ---------------------------------------------------------------- drafting

    def calibrate(self, prompt: Sequence[int], tokens: int = 64, deepest: int = 3) -> DraftReport:
        """Measures drafting on this machine, sets the depth that is fastest at batch 1, 0 where none gains.

        ``prompt``: like those to come. A model without the layer for it gets depth 0. Takes a few seconds at most.
        """
        assert not self.busy, "calibrate before the first request"
        if self.drafter is None:
            return DraftReport(0, 1.0, 0.0, {})
        seconds: dict[int, float] = {}
        kept: dict[int, float] = {0: 0.0}
        for round in range(
            3
        ):  # interleaved, so that a busy moment meets all depths; the fastest counts
            for depth in range(deepest + 1):
                self.drafter.depth = depth
                drafted, accepted = self.drafter.drafted, self.drafter.accepted
                begin = time.perf_counter()
                self.generate([prompt] * 2, tokens, seed=[round, round + 100], stop=[])
                spent = time.perf_counter() - begin
                seconds[depth] = min(spent, seconds.get(depth, spent))
                if depth:
                    share = self.drafter.drafted - drafted
                    kept[depth] = (self.drafter.accepted - accepted) / max(1, share)
        speedups = {depth: seconds[0] / spent for depth, spent in seconds.items()}
        best = max(speedups, key=lambda depth: speedups[depth])
        self.drafter.depth = best
        self.drafter.drafted = self.drafter.accepted = 0
        return DraftReport(best, speedups[best], kept[best], speedups)

    # ---------------------------------------------------------------- loops around steps

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        seed: int | Sequence[int] = 0,
        stop: Sequence[int] | None = None,
    ) -> list[Completion]:
        """One completion per prompt, in order.

        ``seed``: one for all (request i then draws from ``request_seed(seed, i)``), or one per prompt. ``stop``:
        token ids that end a completion; by default the model's eos. A text also ends, with finish "length", at
        ``max_new_tokens`` or where the model's context is full. ``RequestError`` for an impossible request.
        """
        if isinstance(seed, int):
            seed = [request_seed(seed, number) for number in range(len(prompts))]
        if len(seed) != len(prompts):
            raise RequestError(f"{len(seed)} seeds for {len(prompts)} prompts; give one each")
        stops = None if stop is None else tuple(stop)
        requests = [
            Request(tuple(prompt), max_new_tokens, sampling, own, stops)
            for prompt, own in zip(prompts, seed, strict=True)
        ]
        for number, request in enumerate(requests):
            self._check(request, f"prompt {number}")
        done = []
        for events in self._follow(requests):
            last = events[-1]
            if last.finish not in ("stop", "length"):
                raise RequestError(f"generation failed: {last.error or last.finish}")
            tokens = [token for event in events for token in event.tokens]
            done.append(Completion(tokens, "stop" if last.finish == "stop" else "length"))
        return done

    def _follow(self, requests: list[Request]) -> list[list[Event]]:
        """All events of each request, run to their ends."""
        ids = [self.submit(request) for request in requests]
        self.inboxes |= {id: [] for id in ids}
        try:
            while any(id in self.live for id in ids):
                self.told += self._advance()
            return [self.inboxes[id] for id in ids]
        finally:
            self._forget(ids)

    def _forget(self, ids: list[int]) -> None:
        for id in ids:
            self.cancel(id)
            self.inboxes.pop(id)
        self.ended = [event for event in self.ended if event.request not in ids]

    def stream(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        seed: int = 0,
        stop: Sequence[int] | None = None,
    ) -> Iterator[int]:
        """The tokens of one completion as they are written; equal to ``generate([prompt], seed=[seed])``."""
        stops = None if stop is None else tuple(stop)
        id = self.submit(Request(tuple(prompt), max_new_tokens, sampling, seed, stops))
        inbox = self.inboxes[id] = []
        try:
            while id in self.live or inbox:
                if not inbox:
                    self.told += self._advance()
                while inbox:
                    event = inbox.pop(0)
                    if event.finish == "error":
                        raise RequestError(f"generation failed: {event.error}")
                    yield from event.tokens
        finally:
            self._forget([id])

    # ---------------------------------------------------------------- what is asked for

    def _stops(self, request: Request) -> set[int]:
        if request.stop_tokens is not None:
            return set(request.stop_tokens)
        return self._eos()

    def _eos(self) -> set[int]:
        own = set() if self.config.eos_token_id is None else {self.config.eos_token_id}
        return own | self.tokenizer.ends if self.tokenizer else own

    def compiled(self, constraint: Constraint) -> Matcher:
        """Any thread may ask. ``RequestError`` for one that is impossible."""
        if self.grammars is None:
            assert self.tokenizer is not None and self.bytes_of is not None
            self.grammars = Grammars(self.tokenizer, self.bytes_of)
        return self.grammars.matcher(constraint)

    def _room(self, request: Request) -> int:
        """How many tokens may follow: the last one written needs no place of its own."""
        context = self.config.max_position_embeddings
        return min(request.max_new_tokens, context - len(request.prompt) + 1)

    def _check(self, request: Request, name: str = "the prompt") -> None:
        """``RequestError`` where a prompt or a number is impossible."""
        context, vocabulary = self.config.max_position_embeddings, self.config.vocab_size
        if request.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {request.max_new_tokens}; ask for at least 1")
        if not 1 <= len(request.prompt) <= context:
            raise RequestError(
                f"{name} has {len(request.prompt)} tokens; this model reads 1 to {context}"
            )
        if min(request.prompt) < 0 or max(request.prompt) >= vocabulary:
            raise RequestError(
                f"{name} has a token outside the vocabulary of {vocabulary}; "
                "use the model's own tokenizer"
            )
        for token in request.sampling.logit_bias:
            if not 0 <= token < vocabulary:
                raise RequestError(
                    f"logit_bias names token {token}, outside the vocabulary of {vocabulary}"
                )
        if request.logprobs is not None and not 0 <= request.logprobs <= MOST_LOGPROBS:
            raise RequestError(
                f"logprobs is {request.logprobs}; it must lie between 0 and {MOST_LOGPROBS}"
            )
        if "" in request.stop:
            raise RequestError("a stop string is empty; leave it out")
        if self.tokenizer is None and (request.stop or request.constraint):
            raise RequestError("this engine has no tokenizer: no stop strings and no constraint")
