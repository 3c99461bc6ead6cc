"""The engine: requests are submitted, every step writes the next token of many, events tell what is new.

One paged cache, one scheduler, one model. ``generate`` and ``stream`` are a loop around the same steps. Not
thread-safe: one thread owns an engine.

What a request gets does not depend on what else is in the batch, on how prompts were cut into steps, or on whether it
had to give up its place for a while: with the kernels to the bit, in fp32 as in bf16; with plain PyTorch except where
two candidates are nearly as likely (rounding). Its draws come from its own stream, token t from number t.
"""

from __future__ import annotations

import time
from collections import abc
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shenhong.engine.cache import Pages, lay_out
from shenhong.engine.memory import cache_bytes
from shenhong.engine.multi_step import Continued, MultiStepDecoder
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
from shenhong.engine.running import RunningRequest
from shenhong.engine.sampler import Penalties, log_probabilities, request_seed, sample
from shenhong.engine.scheduler import Part, Scheduler, Sequence
from shenhong.engine.speculate import Drafter, DraftReport, Followed
from shenhong.engine.structured import Grammars, Matcher
from shenhong.engine.text import TextStream, token_bytes
from shenhong.errors import ModelError, RequestError
from shenhong.model import Decoder, PreparedDecoder
from shenhong.tokenizer import Tokenizer


@dataclass(frozen=True)
class EngineSettings:
    """What an engine may use."""

    page: int = 16  # tokens of a page
    cache_bytes: int | None = None  # of all layers; at least one text of full length always fits
    step_tokens: int = 512  # of prompts and answers together
    most_running: int = 256  # texts under way at once; more wait
    share_prefixes: bool = True
    draft: int = 0  # tokens guessed ahead by the multi-token-prediction layer; see ``calibrate``
    most_drafting: int = 2  # no guesses while more texts are under way
    cache_share: float = 0.25  # of the memory that weights leave, where cache_bytes is None


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
        allowed = settings.cache_bytes
        if allowed is None:
            allowed = cache_bytes(self.config, dtype.itemsize, settings.cache_share)
        pages = allowed // (sum(self.model.rows) * dtype.itemsize * page)
        # More than every running text could fill is of no use.
        pages = min(pages, settings.most_running * -(-context // page))
        self.pages = Pages(max(pages, -(-context // page)))
        self.pools = self.model.new_pools(self.pages.count, page)
        self.scheduler = Scheduler(self.pages, page, settings.step_tokens, settings.most_running)
        self.multi_step = MultiStepDecoder(self.model, self.pools, self.scheduler)
        self.drafter: Drafter | None = None
        if self.model.join is not None:
            self.drafter = Drafter(self.model, self.pools, self.scheduler, settings.most_drafting)
            self.drafter.depth = settings.draft
        self.grammars: Grammars | None = None  # made when the first constraint comes
        self.running: dict[int, RunningRequest] = {}
        self.ended: list[Event] = []  # cancelled; emitted with the next step
        self.pending: list[
            Event
        ] = []  # of other requests, met while ``generate`` or ``stream`` ran
        self.inboxes: dict[int, list[Event]] = {}  # of ``generate`` and ``stream``
        self.submitted = self.prompt_tokens = self.generated_tokens = 0

    # ---------------------------------------------------------------- requests

    def submit(self, request: Request, matcher: Matcher | None = None) -> int:
        """Queues a request and returns its id. ``RequestError`` for the impossible.

        ``matcher``: what ``compiled`` made of the request's constraint, for this text alone.
        """
        self._validate(request)
        if matcher is None and request.constraint is not None:
            matcher = self.compiled(request.constraint)
        self.submitted += 1
        sequence = Sequence(
            self.submitted,
            list(request.prompt),
            request.priority,
            shareable=self.settings.share_prefixes,
            root=request.owner.encode(),
        )
        running = RunningRequest(
            request, sequence, self._stops(request), self._max_new_tokens(request)
        )
        if self.bytes_of is not None:
            running.stream = TextStream(self.bytes_of, request.stop)
        if not request.sampling.plain:
            running.penalties = Penalties(request.sampling, request.prompt, self.config.vocab_size)
        if matcher:
            running.matcher, running.stops = matcher, running.stops | self._eos()
        self.running[sequence.id] = running
        self.scheduler.add(sequence)
        self.prompt_tokens += len(request.prompt)
        return sequence.id

    def cancel(self, id: int) -> None:
        """Ends a request and frees its pages at once; the event comes with the next step. Unknown ids are ignored."""
        if running := self.running.get(id):
            self.ended.append(self._event(running, [], [], "cancelled"))

    @property
    def busy(self) -> bool:
        return bool(self.running or self.ended or self.pending)

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

    # ---------------------------------------------------------------- weights and states

    def reload(self, decoder: Decoder) -> None:
        """Takes over the weights of another decoder of the same shape, as they are now; later changes do not reach it.

        From here on texts are those of a fresh engine of these weights, to the bit; what the cache held of the old ones
        is forgotten. Errors: RequestError while requests are under way; ModelError for another shape.
        """
        if self.running:
            raise RequestError(
                f"{len(self.running)} requests are under way; finish or cancel them before new weights are taken over"
            )
        if decoder.config != self.config:
            raise ModelError("the new weights are of another shape than the engine's model")
        self.model = self.multi_step.model = PreparedDecoder(decoder, self.model.dtype)
        if self.drafter:
            self.drafter.model = self.model
        self.pages.forget()

    def states(self, tokens: abc.Sequence[int]) -> Tensor:
        """[T, D] final states behind each token of a text, which do not depend on anything else that is asked.

        Errors: RequestError for an impossible text, or where those under way leave it no room.
        """
        self._validate(Request(tuple(tokens), 1), "the text")
        sequence = Sequence(0, list(tokens), shareable=False)
        if not self.scheduler.allocate(sequence, len(tokens)):
            raise RequestError("the requests under way leave no room in the cache; ask again later")
        found = []
        try:
            while sequence.pending:
                part = Part(sequence, min(self.settings.step_tokens, sequence.pending), 0)
                found.append(self.model.forward(lay_out([part.laid]), self.pools))
                sequence.computed += part.length
        finally:
            self.scheduler.release(sequence)
        return torch.cat(found)

    def score(self, tokens: abc.Sequence[int], first: int = 1) -> list[float]:
        """Log-probability (nats) of each token from number ``first`` on, given those before it. Errors: RequestError."""
        if not 1 <= first <= len(tokens):
            raise RequestError(
                f"first is {first}; a token that has others before it has number 1 or more"
            )
        states_TD = self.states(tokens)[first - 1 : -1]
        following = torch.tensor(tokens[first:])
        found: list[float] = []
        for states, wanted in zip(
            states_TD.split(self.settings.step_tokens),
            following.split(self.settings.step_tokens),
            strict=True,
        ):
            logprobs_NV = self.model.logits(states).log_softmax(dim=1)
            found += logprobs_NV.gather(1, wanted[:, None]).squeeze(1).tolist()
        return found

    # ---------------------------------------------------------------- a step

    def step(self) -> list[Event]:
        """Computes the next tokens of some requests and tells what is new about them."""
        emitted, self.pending = self.pending, []
        return emitted + self._advance()

    def _advance(self) -> list[Event]:
        events, self.ended = self.ended, []
        if parts := self.scheduler.plan():
            events += self._write_several(parts) if self._plain(parts) else self._compute(parts)
        emitted: list[Event] = []
        for event in events:
            inbox = self.inboxes.get(event.request)
            (emitted if inbox is None else inbox).append(event)
        return emitted

    def _plain(self, parts: list[Part]) -> bool:
        if self.drafter and self.drafter.depth and len(parts) <= self.drafter.most_running:
            return False
        return self.model.fused is not None and all(
            not part.drafts and self.running[part.sequence.id].plain for part in parts
        )

    def _write_several(self, parts: list[Part]) -> list[Event]:
        requests = [self.running[part.sequence.id] for part in parts]
        written = self.multi_step.write(
            [
                Continued(
                    part,
                    running.samplings[running.written if part.whole else running.max_new_tokens :],
                    running.stops,
                )
                for part, running in zip(parts, requests, strict=True)
            ]
        )
        return [
            self._write(running, tokens)
            for running, tokens in zip(requests, written, strict=True)
            if tokens
        ]

    def _compute(self, parts: list[Part]) -> list[Event]:
        before = [part.sequence.computed for part in parts]
        states_ND = self.model.forward(lay_out(part.laid for part in parts), self.pools)
        rows: list[int] = []  # whose next token is drawn
        whole: list[tuple[RunningRequest, list[int]]] = []  # with the guesses that are checked
        begin = 0
        for part in parts:
            sequence, length, drafts = part
            begin += length
            guesses, sequence.drafts = sequence.drafts[:drafts], []
            if part.whole:
                rows += range(begin - drafts - 1, begin)
                whole.append((self.running[sequence.id], guesses))
            self.scheduler.done(sequence, length - drafts)
        events = self._continue(whole, states_ND, rows) if whole else []
        if self.drafter and self.drafter.depth:
            self._follow_up(parts, before, states_ND)
        return events

    def _continue(
        self, whole: list[tuple[RunningRequest, list[int]]], states_ND: Tensor, rows: list[int]
    ) -> list[Event]:
        """Draws behind every text and every guess, and keeps the guesses that were drawn too."""
        if len(rows) < len(states_ND):
            states_ND = states_ND[torch.tensor(rows)]
        logits_BV = self.model.logits(states_ND)
        drawn = self._sample(
            logits_BV, [(running, i) for running, g in whole for i in range(len(g) + 1)]
        )
        events, row = [], 0
        for running, guesses in whole:
            tokens = drawn[row : row + len(guesses) + 1]
            kept = 0
            while kept < len(guesses) and guesses[kept] == tokens[kept]:
                kept += 1
            if self.drafter:
                self.drafter.accepted += kept
            events.append(self._write(running, tokens[: kept + 1], logits_BV[row:]))
            row += len(guesses) + 1
        return events

    def _follow_up(self, parts: list[Part], before: list[int], states_ND: Tensor) -> None:
        assert self.drafter is not None
        steps, row = [], 0
        for (sequence, length, _), first in zip(parts, before, strict=True):
            if running := self.running.get(sequence.id):
                plain = running.penalties is None and running.matcher is None
                steps.append(
                    Followed(
                        sequence,
                        first,
                        row,
                        running.samplings[running.written :],
                        plain and sequence.pending == 1,
                    )
                )
            row += length
        self.drafter.follow(steps, states_ND)

    def _sample(
        self, logits_BV: Tensor, places: list[tuple[RunningRequest, int]]
    ) -> list[int | None]:
        """For each (text, i) its token number i from now; None where the model's numbers are not finite."""
        changed = [
            i for i, (running, _) in enumerate(places) if running.penalties or running.matcher
        ]
        if changed:
            logits_BV = logits_BV.clone()
        for i in changed:
            running = places[i][0]
            if running.penalties:
                logits_BV[i] = running.penalties.apply(logits_BV[i])
            if running.matcher:
                logits_BV[i].masked_fill_(~running.matcher.mask(), float("-inf"))
        return sample(
            logits_BV, np.stack([running.samplings[running.written + i] for running, i in places])
        )

    def _write(
        self, running: RunningRequest, tokens: list[int | None], logits_BV: Tensor | None = None
    ) -> Event:
        """Takes over what was drawn (from these logits' rows, where somebody asks for them), up to where the text
        ends. All but the last token are in the cache."""
        new: list[int] = []
        logprobs: list[TokenLogprob] = []
        text = ""
        finish: Finish | None = None
        for number, token in enumerate(tokens):
            if token is None:
                return self._event(
                    running, new, logprobs, "error", text, "the model gave no number"
                )
            if token in running.stops:
                finish = "stop"
                break
            new.append(token)
            running.sequence.tokens.append(token)
            running.written += 1
            if running.penalties:
                running.penalties.wrote(token)
            if running.matcher:
                running.matcher.wrote(token)
                if error := running.matcher.error:
                    return self._event(running, new, logprobs, "error", text, error)
            if logits_BV is not None and running.request.logprobs is not None:
                logits_V = logits_BV[number]
                logprobs.append(log_probabilities(logits_V, token, running.request.logprobs))
            if running.stream:
                text += running.stream.add(token)
                if running.stream.stopped:
                    finish = "stop"
                    break
            if running.matcher and running.matcher.complete:
                finish = "stop"
                break
            if running.written == running.max_new_tokens:
                finish = "length"
                break
        self.scheduler.done(running.sequence, number)
        self.generated_tokens += len(new)
        return self._event(running, new, logprobs, finish, text)

    def _event(
        self,
        running: RunningRequest,
        tokens: list[int],
        logprobs: list[TokenLogprob],
        finish: Finish | None,
        text: str = "",
        error: str | None = None,
    ) -> Event:
        """Where it is the last one, the request leaves and its pages are free."""
        if finish is None:
            return Event(running.sequence.id, tokens, text, logprobs)
        if running.stream:
            text += running.stream.finish()
        self.scheduler.remove(running.sequence)
        del self.running[running.sequence.id]
        return Event(running.sequence.id, tokens, text, logprobs, finish, error, running.usage())

    # ---------------------------------------------------------------- drafting

    def calibrate(
        self, prompt: abc.Sequence[int], tokens: int = 64, deepest: int = 3
    ) -> DraftReport:
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
        prompts: abc.Sequence[abc.Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        seed: int | abc.Sequence[int] = 0,
        stop: abc.Sequence[int] | None = None,
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
            self._validate(request, f"prompt {number}")
        done = []
        for events in self.run(requests):
            last = events[-1]
            if last.finish not in ("stop", "length"):
                raise RequestError(f"generation failed: {last.error or last.finish}")
            tokens = [token for event in events for token in event.tokens]
            done.append(Completion(tokens, "stop" if last.finish == "stop" else "length"))
        return done

    def run(self, requests: abc.Sequence[Request]) -> list[list[Event]]:
        """All events of each request, run to their ends. ``RequestError`` for an impossible one."""
        ids: list[int] = []
        try:
            for request in requests:  # where one of them is impossible, those before it leave too
                ids.append(self.submit(request))
                self.inboxes[ids[-1]] = []
            while any(id in self.running for id in ids):
                self.pending += self._advance()
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
        prompt: abc.Sequence[int],
        max_new_tokens: int,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        seed: int = 0,
        stop: abc.Sequence[int] | None = None,
    ) -> abc.Iterator[int]:
        """The tokens of one completion as they are written; equal to ``generate([prompt], seed=[seed])``."""
        stops = None if stop is None else tuple(stop)
        for event in self.follow(Request(tuple(prompt), max_new_tokens, sampling, seed, stops)):
            if event.finish == "error":
                raise RequestError(f"generation failed: {event.error}")
            yield from event.tokens

    def follow(self, request: Request) -> abc.Iterator[Event]:
        """The events of one request as they come. ``RequestError`` for an impossible one."""
        id = self.submit(request)
        inbox = self.inboxes[id] = []
        try:
            while id in self.running or inbox:
                if not inbox:
                    self.pending += self._advance()
                while inbox:
                    yield inbox.pop(0)
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

    def _max_new_tokens(self, request: Request) -> int:
        """How many tokens may follow: the last one written needs no place of its own."""
        context = self.config.max_position_embeddings
        return min(request.max_new_tokens, context - len(request.prompt) + 1)

    def _validate(self, request: Request, name: str = "the prompt") -> None:
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
