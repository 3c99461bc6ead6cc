"""Texts of a prescribed form: a JSON schema, a regular expression, one of several strings, or a grammar.

llguidance keeps the grammar's state and says before each token which ones may come; the engine gives the others no
chance. A text ends where the grammar allows nothing more, or with the model's eos where it allows an end.

Legend: V vocabulary.
"""

from __future__ import annotations

import json
import re

import llguidance
import numpy as np
import torch
from torch import Tensor

from shenhong.engine.request import Constraint
from shenhong.errors import RequestError
from shenhong.tokenizer import Tokenizer

# Enough for schemas people write. They bound memory, and time in part only: what multipleOf and nested repetitions
# cost is not among them, so a server compiles beside its engine, for so long and no longer.
LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=5_000_000, step_max_items=20_000, max_grammar_size=100_000
)


MARKS = re.compile(r"[!-/:-@\[-`{-~]")  # what may mean something in an expression


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, bytes_of: list[bytes]) -> None:
        self.tokenizer, self.bytes_of = tokenizer, bytes_of
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.special_token_ids = [id for id, written in enumerate(bytes_of) if not written]
        self.tokens = [written or f"<{id}>".encode() for id, written in enumerate(bytes_of)]
        self._ids = {written: id for id, written in enumerate(bytes_of) if written}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str) -> list[int]:
        """Tokens that write just this text: the tokenizer's own, unless it changes what it reads."""
        wanted = text.encode()
        ids = self.tokenizer.encode_inside(text)
        if b"".join(self.bytes_of[id] for id in ids) == wanted:
            return ids
        return self._longest_first(wanted)

    def _longest_first(self, wanted: bytes) -> list[int]:
        ids, at = list[int](), 0
        while at < len(wanted):
            ends = range(min(len(wanted), at + self._longest), at, -1)
            end = next((end for end in ends if wanted[at:end] in self._ids), None)
            if end is None:
                break  # the vocabulary cannot write it
            ids.append(self._ids[wanted[at:end]])
            at = end
        return ids


class Grammars:
    """Compiles constraints for one tokenizer. ``bytes_of``: what each id of the model's vocabulary writes."""

    def __init__(self, tokenizer: Tokenizer, bytes_of: list[bytes]) -> None:
        wrapped = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, bytes_of))
        self.tokenizer = llguidance.LLTokenizer(wrapped)
        self.vocabulary = len(bytes_of)

    def matcher(self, constraint: Constraint) -> Matcher:
        """At its beginning; any thread may ask. ``RequestError`` for what is no schema, expression or list, or asks for
        more than can be kept."""
        try:
            grammar = _grammar(constraint)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{constraint.kind} constraint: {_line(error)}") from None
        found = llguidance.LLMatcher(self.tokenizer, grammar, log_level=0, limits=LIMITS)
        if not found.is_error():
            found.compute_bitmask()  # the slowest of all, and copies share what it finds
        complaints = [found.get_error()] if found.is_error() else found.get_grammar_warnings()
        if complaints:
            raise RequestError(f"{constraint.kind} constraint: {_line(complaints[0])}")
        return Matcher(found, self.vocabulary)


def _grammar(constraint: Constraint) -> str:
    if constraint.kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(constraint.value)
    if constraint.kind == "grammar":
        return llguidance.LLMatcher.grammar_from_lark(constraint.value)
    value = json.loads(constraint.value)
    if constraint.kind == "choice":
        if not (isinstance(value, list) and value and all(isinstance(s, str) for s in value)):
            raise ValueError("give a JSON list of strings")
        # One expression, and not a rule for each: of those few thousand may stand side by side.
        either = "|".join(MARKS.sub(lambda mark: f"\\x{ord(mark[0]):02x}", text) for text in value)
        return llguidance.LLMatcher.grammar_from_regex(either)
    if not isinstance(value, dict | bool):
        raise ValueError("a schema is a JSON object")
    return llguidance.LLMatcher.grammar_from_json_schema(
        json.dumps(value), overrides={"whitespace_flexible": False}
    )


def _line(error: object) -> str:
    """Its first line; of a regular expression's error, which shows the place in between, the last as well."""
    lines = str(error).strip().splitlines() or ["it cannot be read"]
    reason = [line for line in lines[1:] if line.startswith("error: ")]
    return " ".join([lines[0], *reason])[:200]


class Matcher:
    """One text's place in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: int) -> None:
        self.matcher, self.vocabulary = matcher, vocabulary

    def copy(self) -> Matcher:
        """For another text of the same form."""
        return Matcher(self.matcher.deep_copy(), self.vocabulary)

    def mask(self) -> Tensor:
        """[V] bool: the tokens that may come next."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self.vocabulary] > 0)

    def wrote(self, token: int) -> None:
        self.matcher.consume_token(token)

    @property
    def complete(self) -> bool:
        """Nothing more may come."""
        return self.matcher.is_stopped()

    @property
    def error(self) -> str | None:
        return _line(self.matcher.get_error()) if self.matcher.is_error() else None
