"""How a person's words are put to a model: the poet is asked in its own form, another's model through its own template."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from shenhong import LONGEST_ANSWER
from shenhong.chat.template import asking
from shenhong.domains.verse.corpus import asked_rhyme
from shenhong.domains.verse.prosody import pingshui
from shenhong.engine import Sampling
from shenhong.errors import RequestError
from shenhong.models import open_writer
from shenhong.tokenizer import Tokenizer


def poem(title: str, form: str | None, rhyme: str | None) -> str:
    """ "五绝 长城 押阳韵": how the poet is asked. ``rhyme`` is one of the 平水韵. Error: RequestError."""
    return " ".join(filter(None, (form, title, None if rhyme is None else _rhyme(rhyme))))


def _rhyme(name: str) -> str:
    groups = [group.name for group in pingshui().groups]
    if name not in groups and name not in {group[-1] for group in groups}:
        some = "".join(group[-1] for group in groups[:30])
        raise RequestError(f"--rhyme {name}: no rhyme of the 平水韵; the level ones are {some}")
    return asked_rhyme(name)


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
