"""How good the model is on held-out text while it trains, and when it is finished.

Legend: N tokens of a batch, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from shenhong.model import Decoder
from shenhong.numerics import documents
from shenhong.train.data import Rows
from shenhong.train.objectives import next_targets, token_loss
from shenhong.train.settings import TrainSettings

Validate = Callable[[Decoder], dict[str, float]]  # what a "valid" event says of the model


@torch.no_grad()
def score_rows(
    model: Decoder, rows: Rows, numbers: torch.Tensor, micro_tokens: int = 8192
) -> tuple[float, int]:
    """Summed nats and number of the counted tokens of some rows of held-out text."""
    nats, counted = 0.0, 0
    device = model.head_weight.device
    for part in numbers.split(max(1, micro_tokens // rows.row_length)):
        batch = rows.batch(part).to(device)
        docs = documents(batch.tokens_N.view(-1, batch.row_length), rows.bos_id)
        states_ND = model(batch.tokens_N, docs).states_ND
        targets_N, weights_N = next_targets(batch)
        nats += float(
            token_loss(states_ND, model.head_weight.to(states_ND.dtype), targets_N, weights_N)
        )
        counted += int(weights_N.sum())
    return nats, counted


def held_out_loss(rows: Rows, settings: TrainSettings) -> Validate:
    """Nats per counted token of the first rows."""
    numbers = torch.arange(min(settings.valid_rows, len(rows)))

    def validate(model: Decoder) -> dict[str, float]:
        nats, counted = score_rows(model, rows, numbers, settings.micro_tokens)
        return {"nats_per_token": nats / max(1, counted)}

    return validate
