"""Drafting: the model's own multi-token-prediction layer guesses the next tokens, one trunk step checks them all.

The trunk draws its own token at every drafted place, from the number of the request's stream that this token has
anyway, and a guess is kept exactly if it is the token drawn. So drafting changes when tokens come and never which:
texts are the same to the bit with it and without, greedy or sampled (rejection sampling, arXiv 2211.17192, would keep
some more guesses, but a text would then depend on when the engine found time to draft). Guesses are drawn with the
same numbers, which makes agreement likely.

The layer needs its own cache row at every position of a text, so it follows each step over the tokens that were kept.

Legend: N tokens, D hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shenhong.engine.cache import lay_out
from shenhong.engine.sampler import sample
from shenhong.engine.scheduler import Scheduler, Sequence
from shenhong.model import PreparedDecoder
from shenhong.model.cache import Pools


class Followed(NamedTuple):
    """A sequence after a step: its tokens from ``first`` to ``computed`` have states from row ``row`` on."""

    sequence: Sequence
    first: int
    row: int
    samplings: np.ndarray  # SAMPLING, of the tokens to come, the next one first
    guess: bool  # whether guesses are of use: not before the prompt's end, nor where penalties change the draw


class DraftReport(NamedTuple):
    """What calibration found at batch 1. ``speedup``: over no drafting, of the best depth; it is off if below 1."""

    depth: int
    speedup: float
    acceptance: float
    speedups: dict[int, float]


class Drafter:
    """Guesses ``depth`` tokens for each text while at most ``most_running`` are under way."""

    def __init__(
        self, model: PreparedDecoder, pools: Pools, scheduler: Scheduler, most_running: int
    ) -> None:
        self.model, self.pools, self.scheduler = model, pools, scheduler
        self.depth, self.most_running = 0, most_running
        self.drafted = self.accepted = 0

    def follow(self, steps: list[Followed], states_ND: Tensor) -> None:
        """Runs the layer over what was kept and leaves guesses in ``sequence.drafts``."""
        steps = [s for s in steps if s.sequence.followed == s.first]
        if not self.depth or not steps or len(steps) > self.most_running:
            return
        sequences = [s.sequence for s in steps]
        counts = [s.sequence.computed - s.first for s in steps]
        rows = [s.row + i for s, count in zip(steps, counts, strict=True) for i in range(count)]
        batch = lay_out(
            (s.tokens[f.first + 1 : s.computed + 1], f.first, s.table)
            for s, f in zip(sequences, steps, strict=True)
        )
        drafts_ND = self.model.draft(states_ND[torch.tensor(rows)], batch, self.pools)
        for sequence in sequences:
            sequence.followed = sequence.computed
        last = torch.tensor(batch.starts_S[1:]) - 1
        able = [
            i
            for i, s in enumerate(steps)
            if s.guess and self.scheduler.allocate(s.sequence, self.depth)
        ]
        self._guess([steps[i] for i in able], drafts_ND[last[able]])

    def _guess(self, steps: list[Followed], states_ND: Tensor) -> None:
        for depth in range(self.depth):
            going = [i for i, s in enumerate(steps) if len(s.samplings) > depth + 1]
            if not going:
                return
            steps, states_ND = [steps[i] for i in going], states_ND[going]
            drawn = sample(
                self.model.logits(states_ND), np.stack([s.samplings[depth] for s in steps])
            )
            # Rows of a page that was taken over may never have been written in this layer: no guess then.
            going = [i for i, token in enumerate(drawn) if token is not None]
            steps, states_ND = [steps[i] for i in going], states_ND[going]
            for step, i in zip(steps, going, strict=True):
                step.sequence.drafts.append(drawn[i] or 0)
            self.drafted += len(steps)
            if steps and depth + 1 < self.depth:
                batch = lay_out(
                    (s.sequence.drafts[-1:], s.sequence.computed + depth, s.sequence.table)
                    for s in steps
                )
                states_ND = self.model.draft(states_ND, batch, self.pools)
