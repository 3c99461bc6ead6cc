"""The library: open a model and write, chat, score and embed with it, in a line each.

    from shenhong import LLM
    poet = LLM("runs/poet")
    print(poet.generate("七绝 长城"))

Everything is what the engine promises: the same call with the same seed gives the same text, to the bit, whatever else
is asked in the same call; a score or an embedding of a text depends on that text alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from shenhong import LONGEST_ANSWER
from shenhong.chat.template import SECONDS, Template
from shenhong.engine import Engine, EngineSettings, Event, Request, Sampling, request_seed
from shenhong.errors import RequestError
from shenhong.model.serving import Serving, planned
from shenhong.models import Source, open_source

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


class Score(NamedTuple):
    """How likely a model holds a text. Natural logarithms; a text of no tokens has none."""

    tokens: list[int]  # the text's, without what stands before it
    logprobs: list[float]  # of each token, given all before it

    @property
    def total(self) -> float:
        return sum(self.logprobs)

    @property
    def perplexity(self) -> float:
        return math.exp(-self.total / len(self.logprobs)) if self.logprobs else math.nan


class LLM:
    """A model that writes: a run folder, a model folder or a GGUF file, opened. One thread at a time.

    ``dtype``: what weights and cache are kept in; "auto" is bfloat16 where the kernel serves the model and the CPU
    multiplies bfloat16, else float32, whatever the file stores. ``serving``: what that came to, and why.
    ``settings``: what the engine may use (cache, batch).
    Errors: ModelError where there is no such model or it cannot be opened.
    """

    def __init__(
        self,
        path: str | Path,
        dtype: torch.dtype | Literal["auto", "float32", "bfloat16"] = "auto",
        settings: EngineSettings | None = None,
    ) -> None:
        if not isinstance(dtype, torch.dtype) and dtype not in ("auto", "float32", "bfloat16"):
            raise RequestError(f'dtype is "auto", "float32" or "bfloat16", not {dtype!r:.40}')
        if dtype == "float32" or dtype == "bfloat16":
            dtype = torch.float32 if dtype == "float32" else torch.bfloat16
        source = open_source(Path(path))
        self.path, self.tokenizer = source.path, source.tokenizer
        self.engine, self.serving = _engine(source, dtype, settings or EngineSettings())
        self._template: Template | None = None

    # ---------------------------------------------------------------- writing

    @overload
    def generate(
        self,
        prompts: str,
        max_tokens: int = ...,
        sampling: Sampling | None = ...,
        *,
        seed: int = ...,
        stop: Sequence[str] = ...,
        plain: bool = ...,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompts: list[str] | tuple[str, ...],
        max_tokens: int = ...,
        sampling: Sampling | None = ...,
        *,
        seed: int = ...,
        stop: Sequence[str] = ...,
        plain: bool = ...,
    ) -> list[str]: ...

    def generate(
        self,
        prompts: str | list[str] | tuple[str, ...],
        max_tokens: int = LONGEST_ANSWER,
        sampling: Sampling | None = None,
        *,
        seed: int = 0,
        stop: Sequence[str] = (),
        plain: bool = False,
    ) -> str | list[str]:
        """An answer to a prompt, or to each of several, in order.

        A prompt is put to the model as it was taught to be asked: ours in its own way, another's as one user message of
        its chat template. One that never learnt to be asked goes on with the bare text, as any does with ``plain``. ``stop``: an answer ends before any of these
        strings. Answer i of a call is drawn from ``request_seed(seed, i)``.
        Errors: RequestError for what cannot be honoured, ServeError for a chat template that cannot be used.
        """
        one = isinstance(prompts, str)
        ids = [self._prompt(prompt, plain) for prompt in _texts(prompts, "prompts")]
        found = self._write(ids, max_tokens, sampling, seed, stop)
        return found[0] if one else found

    def stream(
        self,
        prompt: str,
        max_tokens: int = LONGEST_ANSWER,
        sampling: Sampling | None = None,
        *,
        seed: int = 0,
        stop: Sequence[str] = (),
        plain: bool = False,
    ) -> Iterator[str]:
        """The answer of ``generate``, piece by piece as it is written; whole characters only. Errors: as there."""
        request = self._request(self._prompt(prompt, plain), max_tokens, sampling, seed, stop)
        tokens: list[int] = []
        started = False
        for event in self.engine.follow(request):
            _sound(event)
            tokens += event.tokens
            if event.text:
                yield event.text if started else self._from_start(event.text, tokens)
                started = True

    def chat(
        self,
        messages: Sequence[Message],
        max_tokens: int = LONGEST_ANSWER,
        sampling: Sampling | None = None,
        *,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> str:
        """The assistant's next message in a conversation, through the model's own chat template. Errors: as `generate`."""
        ids = self._opened().prompt_now(_messages(messages))
        return self._write([ids], max_tokens, sampling, seed, stop)[0]

    def chats(
        self,
        conversations: Sequence[Sequence[Message]],
        max_tokens: int = LONGEST_ANSWER,
        sampling: Sampling | None = None,
        *,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """`chat` for several conversations together; answer i is drawn from ``request_seed(seed, i)``. Errors: as `generate`."""
        template = self._opened()
        ids = [template.prompt_now(_messages(messages)) for messages in conversations]
        return self._write(ids, max_tokens, sampling, seed, stop)

    # ---------------------------------------------------------------- measuring

    @overload
    def score(self, texts: str, prompt: str | None = ...) -> Score: ...

    @overload
    def score(
        self, texts: list[str] | tuple[str, ...], prompt: str | None = ...
    ) -> list[Score]: ...

    def score(
        self, texts: str | list[str] | tuple[str, ...], prompt: str | None = None
    ) -> Score | list[Score]:
        """Log-probabilities of given texts, as documents or as answers to a prompt.

        Where the model begins a document with no token of its own, the first token of a text without prompt has
        nothing before it and is left out of the score. Errors: RequestError.
        """
        if isinstance(texts, str):
            return self._score(texts, prompt)
        return [self._score(text, prompt) for text in _texts(texts, "texts")]

    def _score(self, text: str, prompt: str | None) -> Score:
        before = self.tokenizer.begin if prompt is None else self._prompt(prompt)
        tokens = self.tokenizer.encode(text)
        first = max(1, len(before))
        whole = [*before, *tokens]
        if len(whole) <= first:
            return Score([], [])
        return Score(whole[first:], self.engine.score(whole, first))

    def embed(self, texts: str | list[str] | tuple[str, ...]) -> Tensor:
        """[N, D] float32, or [D] of one text: the mean of the final states of its tokens. Errors: RequestError."""
        one = isinstance(texts, str)
        rows = [
            self.engine.states([*self.tokenizer.begin, *self.tokenizer.encode(text)])
            .float()
            .mean(0)
            for text in _texts(texts, "texts")
        ]
        if one:
            return rows[0]
        return torch.stack(rows) if rows else torch.empty(0, self.engine.config.hidden_size)

    # ---------------------------------------------------------------- how it is done

    def _prompt(self, text: str, plain: bool = False) -> list[int]:
        """The tokens of a prompt, up to where its answer begins."""
        if not isinstance(text, str):
            raise RequestError(f"a prompt is a text, not {text!r:.80}")
        tokenizer = self.tokenizer
        if plain or tokenizer.special.template is None:
            return [*tokenizer.begin, *tokenizer.encode(text)]
        if tokenizer.own:
            return tokenizer.encode_prompt(text)
        return self._opened().prompt_now([{"role": "user", "content": text}])

    def _opened(self) -> Template:
        if self._template is None:
            self._template = Template(self.path, self.tokenizer, SECONDS)
        return self._template

    def _request(
        self,
        ids: list[int],
        max_tokens: int,
        sampling: Sampling | None,
        seed: int,
        stop: Sequence[str],
        number: int = 0,
    ) -> Request:
        if isinstance(stop, str):
            raise RequestError("stop takes a list of strings")
        own = request_seed(seed, number)
        return Request(tuple(ids), max_tokens, sampling or Sampling(), own, stop=tuple(stop))

    def _write(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        sampling: Sampling | None,
        seed: int,
        stop: Sequence[str],
    ) -> list[str]:
        requests = [
            self._request(ids, max_tokens, sampling, seed, stop, number)
            for number, ids in enumerate(prompts)
        ]
        answers = []
        for events in self.engine.run(requests):
            _sound(events[-1])
            tokens = [token for event in events for token in event.tokens]
            text = "".join(event.text for event in events)
            answers.append(self._from_start(text, tokens))
        return answers

    def _from_start(self, text: str, tokens: list[int]) -> str:
        """The start of an answer as its tokenizer decodes it: some write a space before the first word and mean none."""
        spaced = text.startswith(" ") and not self.tokenizer.decode(tokens).startswith(" ")
        return text[1:] if spaced else text

    def close(self) -> None:
        """End the process of the chat template, if one was started. The model may be used again."""
        if self._template is not None:
            self._template.close()
            self._template = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_template", None) is not None:
            self.close()


def _engine(
    source: Source, dtype: torch.dtype | Literal["auto"], settings: EngineSettings
) -> tuple[Engine, Serving]:
    plan = planned(source.config, dtype)
    engine = Engine(source.decoder(), source.tokenizer, plan.dtype, settings, take=True)
    if reason := engine.model.unfused:
        plan = Serving(plan.dtype, False, reason)
        if (
            dtype == "auto" and plan.dtype != torch.float32
        ):  # the weights are read anew, as the file has them
            del engine
            engine, after = _engine(source, torch.float32, settings)
            plan = Serving(torch.float32, after.kernel, reason)
    return engine, plan


def _texts(given: object, name: str) -> list[str]:
    """One text or a list of them, as a list. Error: RequestError."""
    listed = [given] if isinstance(given, str) else given
    if not isinstance(listed, list | tuple) or not all(isinstance(text, str) for text in listed):
        raise RequestError(f"{name} takes a text or a list of texts, not {given!r:.80}")
    return list(listed)


def _messages(given: object) -> list[Message]:
    """Error: RequestError for anything but a list of {"role", "content"}."""
    listed = given if isinstance(given, list | tuple) else []
    for message in listed or [None]:
        said = isinstance(message, Mapping) and (message.get("role"), message.get("content"))
        if not said or not all(isinstance(part, str) for part in said):
            raise RequestError(
                f'messages take a list of {{"role": ..., "content": ...}}, not {given!r:.80}'
            )
    return list(listed)


def _sound(event: Event) -> None:
    """Error: RequestError for an answer that failed."""
    if event.finish in ("error", "cancelled"):
        raise RequestError(f"generation failed: {event.error or event.finish}")
