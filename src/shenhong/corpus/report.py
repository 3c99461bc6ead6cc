"""What each step of the refining did, with examples: corpus/report.json and the log."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

_EXAMPLES, _LENGTH = 3, 120


def excerpt(text: str) -> str:
    """The beginning of a text, on one line."""
    text = text.replace("\n", " / ")
    return text if len(text) <= _LENGTH else text[: _LENGTH - 1] + "…"


class Step:
    """Counts of one step: records in, kept, dropped by reason, changed; a few examples of each."""

    def __init__(self, name: str, what: str, rewrites: bool = False) -> None:
        self.name, self.what, self.rewrites = name, what, rewrites
        self.records = self.changed = 0
        self.dropped: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, str]]] = {}
        self.notes: dict[str, object] = {}
        self.seconds = 0.0

    def __enter__(self) -> Step:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start

    def drop(self, reason: str, name: str, text: str, **more: str) -> None:
        """Count a dropped record."""
        self.dropped[reason] += 1
        self._example(reason, {"id": name, "text": excerpt(text), **more})

    def change(self, name: str, before: str, after: str) -> None:
        """Count a record that was rewritten."""
        self.changed += 1
        self._example("changed", {"id": name, "text": excerpt(before), "became": excerpt(after)})

    def _example(self, kind: str, example: dict[str, str]) -> None:
        kept = self.examples.setdefault(kind, [])
        if len(kept) < _EXAMPLES:
            kept.append(example)

    def reasons(self) -> str:
        """Why records were dropped, and how many for each reason."""
        return ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common())

    def summary(self, log: Callable[[str], None]) -> dict:
        """The step as JSON; says in the log what it did, loudly where most of the text is gone."""
        dropped = self.dropped.total()
        parts = [f"kept {self.records - dropped:,} of {self.records:,}"]
        if self.rewrites:
            parts.append(f"changed {self.changed:,}")
        if dropped:
            parts.append(f"dropped {self.reasons()}")
        log(f"{self.name}: {'; '.join(parts)} ({self.seconds:.1f} s)")
        if dropped > self.records / 2:
            log(f"WARNING: {self.name} dropped most of the text; see the examples in the report")
        return {
            "step": self.name,
            "what": self.what,
            "records": self.records,
            "kept": self.records - dropped,
            "dropped": dict(self.dropped.most_common()),
            "changed": self.changed,
            "changed_nothing": not dropped and not self.changed,
            "seconds": round(self.seconds, 2),
            **self.notes,
            "examples": self.examples,
        }
