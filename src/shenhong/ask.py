"""How a person's words are put to a model: ours as it was taught, another's model through its own template."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from shenhong import LONGEST_ANSWER
from shenhong.chat.template import asking
from shenhong.engine import Sampling
from shenhong.models import open_writer
from shenhong.tokenizer import Tokenizer


def answers(
    model: Path,
    prompts: list[str],
    max_tokens: int = LONGEST_ANSWER,
    sampling: Sampling | None = None,
    seed: int = 0,
    plain: bool = False,
) -> list[str]:
    """One answer a prompt, in order; ``plain`` continues the bare text. Errors: ModelError, ServeError, RequestError."""
    writer = open_writer(model)
    with _way(model, writer.tokenizer, plain) as ask:
        return writer.answer(prompts, max_tokens, sampling or Sampling(), seed, ask)


def _way(
    model: Path, tokenizer: Tokenizer, plain: bool
) -> AbstractContextManager[Callable[[str], list[int]]]:
    """From a prompt to its tokens, while the template's process lives."""
    if plain:
        return nullcontext(lambda text: [*tokenizer.begin, *tokenizer.encode(text)])
    if tokenizer.own or tokenizer.special.template is None:
        return nullcontext(tokenizer.encode_prompt)
    return asking(model, tokenizer)
