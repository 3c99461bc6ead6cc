"""Packs conversations into rows, as the model's own template writes them; what the assistant says is what counts.

A turn of the assistant is what the template adds to the conversation before it: from where an answer would begin up to
the token that ends it. Tokens are those of the whole conversation, and a turn begins where they first differ from those
of the prompt, so nothing is cut that the model would read uncut. Some templates rewrite earlier turns as a conversation
goes on (thinking is left out): such a turn is a sample of its own, as the model will meet it.

A conversation that is longer than a row ends before the turn that does not fit. Samples never see each other.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import save

from shenhong.chat.template import SECONDS, Template
from shenhong.corpus.pack import rows
from shenhong.corpus.split import NAMES
from shenhong.errors import DataError, ModelError, RequestError
from shenhong.tokenizer import Tokenizer

_AT_ONCE = 64


class Sample(NamedTuple):
    """Tokens, and which of them are targets."""

    ids: list[int]
    counted: list[int]
    characters: int  # of what counts


def pack(
    corpus: Path,
    tokenizer_folder: Path,
    out: Path,
    width: int,
    allowed: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write out/{train,valid,test}.safetensors; returns their counts.

    ``allowed``: the share of conversations that may be left out because the template refuses them.
    Errors: DataError, ModelError, ServeError for a template that cannot be used.
    """
    tokenizer = Tokenizer.load(tokenizer_folder)
    if tokenizer.special.template is None:
        raise ModelError(
            f"{tokenizer_folder}: this model has no chat template, so nothing says how a conversation is put to it; begin with a model that was tuned to talk"
        )
    facts: dict[str, Any] = {}
    # One event loop for all: what bounds the renderings at a time belongs to it.
    with Template(tokenizer_folder, tokenizer, SECONDS) as template, asyncio.Runner() as runner:
        for part in NAMES:
            table = pq.read_table(corpus / f"{part}.parquet", columns=["id", "conversation"])
            names, talks = table["id"].to_pylist(), table["conversation"].to_pylist()
            found = _samples(runner, template, names, talks, width)
            facts[part] = _write(out / f"{part}.safetensors", found, width, tokenizer)
            _tell(part, found, facts[part], len(table), width, allowed, say)
    return facts


class Found(NamedTuple):
    samples: list[Sample]
    refused: list[str]  # "id: why", of conversations of which nothing is left
    too_long: int  # conversations of which not even the first answer fits
    shortened: int  # conversations that end before their last answer


def _samples(
    runner: asyncio.Runner, template: Template, names: list[str], talks: list[str], width: int
) -> Found:
    samples: list[Sample] = []
    refused: list[str] = []
    too_long = shortened = 0
    for start in range(0, len(talks), _AT_ONCE):
        made = runner.run(_together(template, map(json.loads, talks[start : start + _AT_ONCE])))
        for name, turns in zip(names[start:], made, strict=False):
            if isinstance(turns, RequestError):
                refused.append(f"{name}: {turns}")
                continue
            fit = [turn for turn in turns if len(turn.ids) <= width]
            too_long += not fit
            shortened += 0 < len(fit) < len(turns)
            samples += _merged(fit)
    return Found(samples, refused, too_long, shortened)


async def _together(
    template: Template, talks: Iterable[dict[str, Any]]
) -> list[list[Sample] | RequestError]:
    async def one(talk: dict[str, Any]) -> list[Sample] | RequestError:
        try:
            return await _turns(template, talk["messages"], talk.get("tools") or ())
        except RequestError as error:
            return error

    return list(await asyncio.gather(*map(one, talks)))


async def _turns(template: Template, messages: list[dict[str, Any]], tools: Any) -> list[Sample]:
    """Each turn of the assistant with all that is before it, as the conversation stands when it ends."""
    ends = {template.tokenizer.eos_id, *template.tokenizer.special.ends}
    found: list[Sample] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, _ = await template.prompt(messages[:number], generation=True, tools=tools)
        ids, _ = await template.prompt(messages[: number + 1], generation=False, tools=tools)
        begin = _common(asked, ids)
        last = max((i for i in range(begin, len(ids)) if ids[i] in ends), default=None)
        if last is None:  # the template ends it with nothing that a model could stop at
            ids, last = [*ids, template.tokenizer.eos_id], len(ids)
        counted = [int(begin <= i <= last) for i in range(len(ids))]
        found.append(Sample(ids, counted, len(message["content"])))
    return found


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens they begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _merged(turns: list[Sample]) -> list[Sample]:
    """Turns as one sample, as long as each is written the same when the next is there."""
    merged: list[Sample] = []
    for turn in turns:
        if merged and _common(merged[-1].ids, turn.ids) >= _last(merged[-1].counted) + 1:
            before = merged.pop()
            counted = [
                max(a, b) for a, b in zip(turn.counted, before.counted, strict=False)
            ] + turn.counted[len(before.counted) :]
            turn = Sample(turn.ids, counted, before.characters + turn.characters)
        merged.append(turn)
    return merged


def _last(counted: list[int]) -> int:
    return max(i for i, one in enumerate(counted) if one)


def _write(path: Path, found: Found, width: int, tokenizer: Tokenizer) -> dict[str, Any]:
    samples = found.samples
    if not samples:
        why = (
            f"{found.too_long} are longer than train.sequence_length {width}"
            if found.too_long
            else "; ".join(found.refused[:3])
        )
        raise DataError(f"no conversation is left for {path.stem}: {why or 'add conversations'}")
    ids = np.concatenate([np.asarray(sample.ids, np.int32) for sample in samples])
    counted = np.concatenate([np.asarray(sample.counted, np.uint8) for sample in samples])
    offsets = np.concatenate([[0], np.cumsum([len(sample.ids) for sample in samples])])
    tokens, counts, starts = rows(ids, counted, offsets, width, tokenizer)
    characters = sum(sample.characters for sample in samples)
    tensors = {"tokens": tokens, "counted": counts, "starts": starts}
    path.write_bytes(save(tensors, {"characters": str(characters)}))
    return {
        "documents": len(samples),
        "rows": len(tokens),
        "tokens": int(offsets[-1]),
        "counted": int(counts.sum()),
        "characters": characters,
        "refused": len(found.refused),
        "too_long": found.too_long,
        "shortened": found.shortened,
    }


def _tell(
    name: str,
    found: Found,
    facts: dict[str, Any],
    total: int,
    width: int,
    allowed: float,
    say: Callable[[str], None],
) -> None:
    """Say what was packed and what was left out. Error: DataError where the template refused too much."""
    refused = len(found.refused)
    if refused:
        what = f"{refused:,} of {total:,} conversations of {name} are refused by the model's chat template: {'; '.join(found.refused[:3])}"
        if refused > allowed * total:
            raise DataError(f"{what}; mend or remove them, or set corpus.max_unreadable")
        say(f"WARNING: left out {what}")
    if found.too_long:
        say(
            f"WARNING: left out {found.too_long:,} conversations of {name} whose first answer does not fit into train.sequence_length {width}"
        )
    if found.shortened:
        say(
            f"{found.shortened:,} conversations of {name} end before a turn that does not fit into {width} tokens"
        )
    say(
        f"pack {name}: {facts['documents']:,} conversations in {facts['rows']:,} rows of {width}, "
        f"{facts['counted'] / facts['tokens']:.0%} of their tokens are answers"
    )
