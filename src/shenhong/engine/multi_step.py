"""Writing ahead: where nothing is to be decided between two tokens, one call of the kernel writes several of each text.

How many is a question of time alone: short enough that a text still flows and whoever comes waits little, long enough
that a step's bookkeeping, done once a call, weighs nothing. What is written does not depend on it.

Legend: S sequences, K most tokens a call writes.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from shenhong.engine.cache import lay_out
from shenhong.engine.scheduler import Part, Scheduler
from shenhong.model import PreparedDecoder
from shenhong.model.cache import Pools
from shenhong.numerics.cpu.decode import SAMPLING, Writing

SECONDS = 1 / 60  # a call may take: a frame of a display
STEPS = 32  # tokens of a text that it may write


class Continued(NamedTuple):
    """A part of a text, and how the text goes on behind it.

    ``samplings``: SAMPLING of all the tokens it may still write; none where its prompt is not at its end.
    """

    part: Part
    samplings: np.ndarray
    stops: Collection[int]


class MultiStepDecoder:
    def __init__(self, model: PreparedDecoder, pools: Pools, scheduler: Scheduler) -> None:
        self.model, self.pools, self.scheduler = model, pools, scheduler
        self.pace = SECONDS  # of one token of every text; until it is known, a call writes one

    def write(self, texts: list[Continued]) -> list[list[int | None]]:
        """What each text goes on with, a stop included; None in place of a token where the model's numbers are not
        finite. The parts are in the cache afterwards, and what was written is but for the last token."""
        steady = all(text.part.length == 1 and len(text.samplings) for text in texts)
        steps = min(STEPS, max(1, int(SECONDS / self.pace))) if steady else 1
        limits = [min(steps, len(text.samplings)) for text in texts]
        parts = [text.part for text in texts]
        if steps > 1 and not self.scheduler.extend(parts, limits):
            limits = [min(1, tokens) for tokens in limits]
        samplings_SK = np.empty((len(texts), max(limits)), SAMPLING)
        for row, text, tokens in zip(samplings_SK, texts, limits, strict=True):
            row[:tokens] = text.samplings[:tokens]
        writing = Writing(np.array(limits, np.int32), samplings_SK, [text.stops for text in texts])
        begin = time.perf_counter()
        written: list[list[int | None]] = [
            [*tokens[:-1], None] if tokens and tokens[-1] < 0 else [*tokens]
            for tokens in self.model.write(lay_out(p.laid for p in parts), self.pools, writing)
        ]
        if steady:
            self.pace = (time.perf_counter() - begin) / max(map(len, written))
        for sequence, length, _ in parts:
            self.scheduler.done(sequence, length)
        return written
