"""How good the model is on held-out text while it trains, and when it is finished.

Legend: R rows, P pieces of a row, N tokens of a batch, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from shenhong.model import Decoder
from shenhong.numerics import boundaries, cross_entropy
from shenhong.train.data import Rows
from shenhong.train.objectives import next_targets
from shenhong.train.settings import TrainSettings

PIECE = 64  # tokens that are compared as one when two looks are: near enough to independent of each other


class Look(NamedTuple):
    """What one look at held-out text found.

    measures   what a "valid" event says
    nats_P     loss of each piece of the text, the same pieces at every look; what the best model is chosen by, or None
    """

    measures: dict[str, float]
    nats_P: torch.Tensor | None = None


Validate = Callable[[Decoder], Look]


@torch.no_grad()
def score_rows(
    model: Decoder, rows: Rows, numbers: torch.Tensor, micro_tokens: int = 8192
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed nats, and number of the counted tokens, of each PIECE tokens of some rows: float64 [P], int64 [P]."""
    nats: list[torch.Tensor] = []
    counted: list[torch.Tensor] = []
    device = model.head_weight.device
    for part in numbers.split(max(1, micro_tokens // rows.row_length)):
        batch = rows.batch(part).to(device)
        states_ND = model(batch.tokens_N, boundaries(batch.starts_N)).states_ND
        targets_N, weights_N = next_targets(batch)
        head_VD = model.head_weight.to(states_ND.dtype)
        _, logprobs_N = cross_entropy(states_ND, head_VD, targets_N, weights_N)
        for row in (-logprobs_N.double() * weights_N).view(len(part), -1):
            nats += [piece.sum() for piece in row.split(PIECE)]
        for row in weights_N.view(len(part), -1):
            counted += [piece.count_nonzero() for piece in row.split(PIECE)]
    return torch.stack(nats).cpu(), torch.stack(counted).cpu()


class HeldOut:
    """Looks at the first rows of held-out text; ``rows`` of them, which a plan may lower where looking is dear."""

    def __init__(self, rows: Rows, settings: TrainSettings) -> None:
        self.held_out, self.micro_tokens = rows, settings.micro_tokens
        enough = -(-settings.valid_tokens // rows.row_length)
        self.rows = min(settings.valid_rows or enough, len(rows))

    def __call__(self, model: Decoder) -> Look:
        nats_P, counted_P = score_rows(
            model, self.held_out, torch.arange(self.rows), self.micro_tokens
        )
        mean = float(nats_P.sum()) / max(1, int(counted_P.sum()))
        return Look({"nats_per_token": mean}, nats_P)
