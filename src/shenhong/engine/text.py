"""From tokens to text while they come: whole characters only, and stop strings that are never shown.

A byte-level token is a run of bytes, so a character may be spread over several tokens; and the last characters may
turn out to be the beginning of a stop string. Both wait until it is certain what they are.
"""

from __future__ import annotations

import codecs
import re

from shenhong.tokenizer import Tokenizer
from shenhong.tokenizer.tokenizer import byte_alphabet

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: Tokenizer, vocabulary: int) -> list[bytes]:
    """What each id of a model's vocabulary writes; special tokens and unused ids write nothing.

    Byte-level tokens are spelled in GPT-2's alphabet; in SentencePiece's way "▁" is a space and "<0x0A>" a byte.
    """
    backend = tokenizer.backend
    table = {character: byte for byte, character in byte_alphabet().items()}
    special = {id for id, token in backend.get_added_tokens_decoder().items() if token.special}
    found = []
    for id in range(tokenizer.vocab_size):
        word = "" if id in special else backend.id_to_token(id) or ""
        if not tokenizer.byte_level:
            byte = _BYTE.fullmatch(word)
            found.append(bytes([int(byte[1], 16)]) if byte else word.replace("▁", " ").encode())
        elif id not in tokenizer.literal and all(character in table for character in word):
            found.append(bytes(table[character] for character in word))
        else:
            found.append(word.encode())
    return found + [b""] * (vocabulary - len(found))


class TextStream:
    """The text of one answer. ``add`` returns what is new and certain."""

    def __init__(self, bytes_of: list[bytes], stop: tuple[str, ...] = ()) -> None:
        self.bytes_of, self.stop = bytes_of, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        return self._pass(self.decoder.decode(self.bytes_of[token]))

    def finish(self) -> str:
        """What was held back, unless the text ended with a stop string."""
        if self.stopped:
            return ""
        text = self._pass(self.decoder.decode(b"", final=True))
        if self.stopped:
            return text
        text, self.held = text + self.held, ""
        return text

    def _pass(self, new: str) -> str:
        text = self.held + new
        places = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self.held = True, ""
            return text[: min(places)]
        certain = len(text) - max((_overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[certain:]
        return text[:certain]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
