"""The part of the evaluation that only verse has: form, rhyme and tones of what a model wrote.

Asked are the form and the title of held-out poems and nothing else. Beside the model stand the held-out
human poems, and the same poems with their characters shuffled, read by the same code in the same script.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from shenhong.domains.base import Questions
from shenhong.domains.verse.prompts import Prompt
from shenhong.domains.verse.prosody import FORMS, Verse, analyse
from shenhong.evaluate.metrics import mean, shuffled

_PUNCTUATION = "，。；？！、：\n "


def questions(held_out: dict[str, list[str]], count: int, seed: int) -> Questions:
    """`count` held-out poems (all, if there are fewer), the same for the same seed and corpus, asked by form and title."""
    order = np.argsort(np.array(held_out["id"]), kind="stable")
    chosen = np.random.default_rng(seed).permutation(order)[:count].tolist()
    rows = {name: [column[i] for i in chosen] for name, column in held_out.items()}
    prompts = [
        str(Prompt(form, title, None))
        for form, title in zip(rows["form"], rows["title"], strict=True)
    ]
    return Questions(prompts, rows["text"], rows)


def reward(asked: Prompt, answer: str) -> float:
    """0 out of the form that was asked for, else a third each for the form, the rhyme and the share of lines that scan.

    Where a rhyme was asked for, another one counts as none.
    """
    verse = analyse(answer.strip(), asked.form)
    if not verse.form_exact:
        return 0.0
    group = verse.rhyme_group
    rhymes = verse.rhyme_ok and (asked.rhyme is None or (group and group.name[-1] == asked.rhyme))
    return (1.0 + bool(rhymes) + verse.tone_score) / 3


def reference(texts: Sequence[str], forms: Sequence[str], seed: int) -> dict:
    """The human poems, and the same with shuffled characters."""
    return {
        "human": measure(texts, forms),
        "shuffled": measure(list(shuffled(texts, seed, keep=_PUNCTUATION)), forms),
    }


def measure(texts: Sequence[str], forms: Sequence[str]) -> dict:
    """Aggregates over all poems, {"all": …, "五绝": …}, as `summarise` gives them."""
    verses = [analyse(text.strip(), form) for text, form in zip(texts, forms, strict=True)]
    result = {"all": summarise(verses)}
    for name in FORMS:
        if any(form == name for form in forms):
            result[name] = summarise(
                [verse for verse, form in zip(verses, forms, strict=True) if form == name]
            )
    return result


def summarise(verses: Iterable[Verse]) -> dict:
    """Shares of the poems, and the mean tone score of their lines; a poem out of form scores 0 in all.

    tone_score: mean over lines; its error is over poems, for lines of one poem are not independent.
    """
    verses = list(verses)
    return {
        "poems": len(verses),
        "form_exact": mean([v.form_exact for v in verses]).to_json(),
        "rhyme": mean([v.rhyme_ok for v in verses]).to_json(),
        "level_rhyme": mean([v.level_rhyme for v in verses]).to_json(),
        "tone_score": mean([v.tone_score for v in verses]).to_json(),
        "regulated": mean([v.regulated for v in verses]).to_json(),
    }


def samples(poems: dict[str, list[str]], answers: Sequence[str], count: int) -> list[dict]:
    """The first `count` answers, not chosen by anyone, with their tones and rhymes for the report."""
    authors = poems.get("author", [""] * len(answers))
    rows = zip(poems["form"], poems["title"], authors, poems["text"], answers, strict=True)
    return [
        {
            "form": form,
            "title": title,
            "text": answer,
            "verse": analyse(answer.strip(), form).to_json(),
            "human": {"author": author, "text": text, "verse": analyse(text, form).to_json()},
        }
        for form, title, author, text, answer in list(rows)[:count]
    ]
