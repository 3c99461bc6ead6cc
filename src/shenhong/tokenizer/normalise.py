"""One spelling for one text: Unicode form, white space, variant glyphs, simplified characters.

NFC, not NFKC: it maps the CJK compatibility ideographs (U+F900...) to the unified ones and leaves
Chinese punctuation as it is, where NFKC would turn ，！？（） into ASCII and 。 not. The model speaks
simplified Chinese and accepts both scripts: a prompt goes through `normalise` like the corpus did.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata

from shenhong.tokenizer.variants import VARIANTS

IDEOGRAPH = "\u3007\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
"""Ranges of Chinese characters, for use inside a regular expression's brackets."""

_VARIANT = re.compile("[" + "".join(VARIANTS) + "]")
# Control characters, byte order marks and zero-width marks; tab and line feed stay. The zero-width
# joiner and non-joiner stay as well: Persian, Indic scripts and emoji are spelt with them.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2060\ufeff]")
# Marks that combine with what stands before them are no letters; longer runs of such signs are looked at one by one.
_SIGNS = re.compile(r"[^\w\s\x00-\x7f]{32,}")
_BLANK = re.compile(r"\n{3,}")
_CHINESE = re.compile(f"[{IDEOGRAPH}]")


def unify(text: str) -> str:
    """NFC without control characters, line ends as \\n, no trailing blanks, no runs of empty lines."""
    text = _SIGNS.sub(_in_order, text)
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _INVISIBLE.sub("", text)
    # Not by an expression: at every blank of a long run it would look for the end of the line anew.
    lines = "\n".join(line.rstrip() for line in text.split("\n"))
    return _BLANK.sub("\n\n", lines).strip()


def _in_order(run: re.Match[str]) -> str:
    """The same signs, with marks on one character in the order that NFC gives them.

    Python orders them by insertion, which takes minutes for a million that come in disorder.
    """
    signs = "".join(unicodedata.normalize("NFD", sign) for sign in run[0])
    pieces = (
        sorted(some, key=unicodedata.combining) if marks else some
        for marks, some in itertools.groupby(signs, lambda sign: unicodedata.combining(sign) > 0)
    )
    return "".join(itertools.chain.from_iterable(pieces))


@functools.cache
def _converter():
    import opencc  # its dictionaries take a moment: loaded at the first use

    return opencc.OpenCC("t2s")


@functools.lru_cache(maxsize=1 << 16)
def _simplified_character(character: str) -> str:
    converted = _converter().convert(character)
    return converted if len(converted) == 1 else character


def simplify(text: str) -> str:
    """Simplified Chinese of the same length, so that every character keeps its traditional original.

    OpenCC converts by phrases (乾坤 stays, 乾燥 becomes 干燥). Where that changes the length, the text is
    converted character by character instead.
    """
    if not _CHINESE.search(text):
        return text
    if _VARIANT.search(text):
        text = _VARIANT.sub(lambda match: VARIANTS[match[0]], text)
    converted = _converter().convert(text)
    if len(converted) == len(text):
        return converted
    return "".join(map(_simplified_character, text))


def normalise(text: str) -> str:
    """`unify` and `simplify`: what is done to every text and to every prompt."""
    return simplify(unify(text))
