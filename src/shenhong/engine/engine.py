"""Generation: many prompts at once, or one prompt token by token.

A call runs its prompts together, then steps all rows by one token until each has ended; rows that ended are taken out
of the batch. Rows differ in length, so no prompt is padded. Tokens in, tokens out: text is the tokenizer's matter.

Legend: B rows alive, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shenhong.engine.request import EngineStats, Event, Request, Sampling, Usage
from shenhong.engine.sampler import request_seed, sample, uniforms
from shenhong.engine.text import TextStream, token_bytes
from shenhong.errors import RequestError
from shenhong.model import Decoder, PreparedDecoder
from shenhong.numerics import Documents
from shenhong.tokenizer import Tokenizer


class Completion(NamedTuple):
    """What was written after one prompt; a stop token ends it and is not part of it."""

    tokens: list[int]
    finish: Literal["stop", "length"]


class Engine:
    """Generates from a decoder's weights as they are now.

    ``dtype``: what weights, cache and products are kept in. ``rows``: how many prompts run together; more wait.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer | None = None,
        dtype: torch.dtype = torch.float32,
        rows: int = 512,
    ) -> None:
        self.bytes_of = token_bytes(tokenizer) if tokenizer else None
        self.live: dict[int, Live] = {}
        self.next_id = 0
        self.prompt_tokens = self.generated_tokens = 0
        self.model = PreparedDecoder(decoder, dtype)
        self.config = decoder.config
        self.rows = rows

    def submit(self, request: Request) -> int:
        """Queues a request; its id. ``RequestError`` for the impossible."""
        self._check([request.prompt], request.max_new_tokens, [request.seed])
        stops = self._stops(request.stop_tokens)
        room = self._room(request.prompt, request.max_new_tokens)
        text = TextStream(self.bytes_of, request.stop) if self.bytes_of else None
        self.next_id += 1
        self.live[self.next_id] = Live(request, stops, room, text)
        return self.next_id

    def cancel(self, id: int) -> None:
        """Ends a request; its last event comes with the next step. Unknown ids are left alone."""
        if id in self.live:
            self.live[id].cancelled = True

    @property
    def busy(self) -> bool:
        return bool(self.live)

    def step(self) -> list[Event]:
        """One token for every request."""
        events = []
        for id, live in list(self.live.items()):
            event = self._advance(id, live)
            self.generated_tokens += len(event.tokens)
            if event.finish:
                del self.live[id]
            events.append(event)
        return events

    def stats(self) -> EngineStats:
        n = len(self.live)
        return EngineStats(n, 0, 0, 0, 0, self.prompt_tokens, self.generated_tokens, 0, 0, 0, 0)

    def _advance(self, id: int, live: Live) -> Event:
        request = live.request
        tokens: list[int] = []
        text, finish = "", None
        if live.cancelled:
            finish = "cancelled"
        else:
            if live.running is None:
                self.prompt_tokens += len(request.prompt)
                live.running = Running(
                    self.model,
                    [request.prompt],
                    request.sampling,
                    uniforms([request.seed], live.room),
                )
            else:
                live.running.feed(torch.tensor([live.last]))
            live.last = int(live.running.draw())
            if live.last in live.stops:
                finish = "stop"
            else:
                tokens = [live.last]
                live.written += 1
                text = live.text.add(live.last) if live.text else ""
                if live.text and live.text.stopped:
                    finish = "stop"
                elif live.written == live.room:
                    finish = "length"
        if finish and live.text:
            text += live.text.finish()
        usage = Usage(len(request.prompt), live.written, 0) if finish else None
        return Event(id, tokens, text, [], finish, None, usage)

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
        seeds = self._check(prompts, max_new_tokens, seed)
        stops = self._stops(stop)
        done: list[Completion] = []
        for first in range(0, len(prompts), self.rows):
            part = slice(first, first + self.rows)
            done += self._batch(prompts[part], max_new_tokens, sampling, seeds[part], stops)
        return done

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
        self._check([prompt], max_new_tokens, [seed])
        stops, room = self._stops(stop), self._room(prompt, max_new_tokens)
        running = Running(self.model, [prompt], sampling, uniforms([seed], room))
        for step in range(room):
            tokens_B = running.draw()
            if tokens_B.item() in stops:
                return
            yield int(tokens_B)
            if step + 1 < room:
                running.feed(tokens_B)

    def _batch(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        seeds: list[int],
        stops: list[int],
    ) -> list[Completion]:
        rooms = [self._room(prompt, max_new_tokens) for prompt in prompts]
        running = Running(self.model, prompts, sampling, uniforms(seeds, max(rooms)))
        ends = torch.tensor(stops, dtype=torch.long)
        room_B, length_B = torch.tensor(rooms), torch.tensor(rooms)
        written = torch.zeros(len(prompts), max(rooms), dtype=torch.long)
        stopped = torch.zeros(len(prompts), dtype=torch.bool)
        rows = torch.arange(len(prompts))  # the prompts still in the batch
        for step in range(max(rooms)):
            tokens_B = running.draw()
            written[rows, step] = tokens_B
            ended = rows[torch.isin(tokens_B, ends) & ~stopped[rows]]
            stopped[ended] = True
            length_B[ended] = step
            full = room_B[rows] <= step + 1
            alive = (~stopped[rows] & ~full).nonzero().squeeze(1)
            if not len(alive):
                break
            # Taking rows out copies the cache, so rows that stopped wait for company; full ones cannot.
            if len(alive) <= 0.8 * len(rows) or full.any():
                rows, tokens_B = rows[alive], tokens_B[alive]
                running.keep(alive)
            running.feed(tokens_B)
        return [
            Completion(written[i, :length].tolist(), "stop" if stopped[i] else "length")
            for i, length in enumerate(length_B.tolist())
        ]

    # ---------------------------------------------------------------- what is asked for

    def _stops(self, stop: Sequence[int] | None) -> list[int]:
        if stop is not None:
            return list(stop)
        return [] if self.config.eos_token_id is None else [self.config.eos_token_id]

    def _room(self, prompt: Sequence[int], max_new_tokens: int) -> int:
        """How many tokens may follow: the last one written needs no place of its own."""
        return min(max_new_tokens, self.config.max_position_embeddings - len(prompt) + 1)

    def _check(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        seed: int | Sequence[int],
    ) -> list[int]:
        """One seed per prompt; ``RequestError`` where a prompt or a number is impossible."""
        context, vocabulary = self.config.max_position_embeddings, self.config.vocab_size
        if max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
        for number, prompt in enumerate(prompts):
            if not 1 <= len(prompt) <= context:
                raise RequestError(
                    f"prompt {number} has {len(prompt)} tokens; this model reads 1 to {context}"
                )
            if min(prompt) < 0 or max(prompt) >= vocabulary:
                raise RequestError(
                    f"prompt {number} has a token outside the vocabulary of {vocabulary}; "
                    "use the model's own tokenizer"
                )
        if isinstance(seed, int):
            return [request_seed(seed, number) for number in range(len(prompts))]
        if len(seed) != len(prompts):
            raise RequestError(f"{len(seed)} seeds for {len(prompts)} prompts; give one each")
        return list(seed)


@dataclass
class Live:
    request: Request
    stops: list[int]
    room: int
    text: TextStream | None
    running: Running | None = None
    last: int = 0
    written: int = 0
    cancelled: bool = False


class Running:
    """Prompts being continued together. ``draws``: [B, steps] uniform numbers, one a token."""

    def __init__(
        self,
        model: PreparedDecoder,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        draws: Tensor,
    ) -> None:
        self.model, self.sampling, self.draws = model, sampling, draws
        self.drawn = 0
        tokens = [token for prompt in prompts for token in prompt]
        tokens_N = torch.tensor(tokens, dtype=torch.long, device=model.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        starts = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))
        positions = torch.arange(len(tokens)) - starts[:-1].repeat_interleave(lengths)
        docs = Documents(starts.int().to(model.device), positions.int().to(model.device))
        self.cache = model.new_cache(len(prompts))
        last_B = (starts[1:] - 1).to(model.device)
        self.states_BD = model.prefill(tokens_N, docs, self.cache)[last_B]

    def draw(self) -> Tensor:
        """[B] next tokens, on the CPU."""
        logits_BV = self.model.logits(self.states_BD)
        tokens_B = sample(logits_BV, self.draws[:, self.drawn].to(logits_BV.device), self.sampling)
        self.drawn += 1
        return tokens_B.cpu()

    def feed(self, tokens_B: Tensor) -> None:
        """Appends what was drawn."""
        tokens_B1 = tokens_B[:, None].to(self.model.device)
        self.states_BD = self.model.step(tokens_B1, self.cache)[:, 0]

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows only."""
        self.draws = self.draws[rows]
        rows = rows.to(self.model.device)
        self.states_BD = self.states_BD[rows]
        self.cache.keep(rows)
