"""Thinking: what a model writes between <think> and </think>, kept apart from its answer while both come in deltas."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

OPENED, CLOSED = "<think>", "</think>"


def may_begin(text: str, tag: str) -> int:
    """How many of the last characters may be the beginning of a tag that is still coming."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)


class Thinking:
    """Cuts text that comes in deltas into ("reasoning", …) and ("text", …); a tag that may be coming is held back."""

    def __init__(self, enabled: bool, inside: bool) -> None:
        self.enabled, self.inside, self._held = enabled, inside, ""
        self._started = False  # white space before the first words of a part is dropped

    def feed(self, text: str, last: bool = False) -> list[tuple[str, str]]:
        if not self.enabled:
            return [("text", text)] if text else []
        text, self._held = self._held + text, ""
        found: list[tuple[str, str]] = []
        while True:
            tag = CLOSED if self.inside else OPENED
            before, hit, after = text.partition(tag)
            if not hit:
                break
            self._emit(found, before)
            self.inside, self._started, text = not self.inside, False, after
        held = 0 if last else may_begin(text, tag)
        self._emit(found, text[: len(text) - held])
        self._held = text[len(text) - held :]
        return found

    def _emit(self, found: list[tuple[str, str]], text: str) -> None:
        text = text if self._started else text.lstrip()
        if text:
            self._started = True
            found.append(("reasoning" if self.inside else "text", text))


class Thoughts:
    """Counts tokens that were written inside of thinking, its tags among them. ``bytes_of``: what each token writes."""

    def __init__(self, bytes_of: Sequence[bytes], enabled: bool, inside: bool) -> None:
        self.bytes_of, self.cut = bytes_of, Thinking(enabled, inside)

    def among(self, tokens: Iterable[int]) -> int:
        count = 0
        for token in tokens if self.cut.enabled else ():
            began = self.cut.inside
            self.cut.feed(self.bytes_of[token].decode("latin-1"))  # a byte each: tags are ASCII
            count += began or self.cut.inside
        return count
