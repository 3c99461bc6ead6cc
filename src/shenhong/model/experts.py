"""The expert block: a router, many small experts, and a shared expert that every token passes.

DeepSeek-V3, eq. 12-16: s = sigmoid(u e^T); the K experts of best s + b are chosen, b steering the choice only;
gates are the chosen s, normalised to one, times the routed scaling factor. DeepSeek-V2 (arXiv 2405.04434, eq. 20-22)
has s = softmax(u e^T), no bias, and gates that are not normalised.

Legend: N tokens, D hidden, E experts, K chosen, I expert width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shenhong.model.balance import (
    RouterStats,
    document_of_token,
    margin_histogram,
    sequence_balance,
)
from shenhong.model.config import ModelConfig
from shenhong.model.layers import FeedForward
from shenhong.numerics import ops


class Observe(NamedTuple):
    """What the routers shall note beside the load; each costs a little time."""

    balance_loss: bool = False
    margins: bool = False


LOAD_ONLY = Observe()


class Router(nn.Module):
    """Scores in fp32 whatever the compute dtype, as in V3."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        # A buffer, not a parameter: no gradient ever moves it. Where the router has none it stays zero and unsaved.
        self.register_buffer(
            "e_score_correction_bias",
            torch.zeros(config.n_routed_experts),
            persistent=config.has_selection_bias,
        )

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(scores [N, E] fp32, chosen [N, K], gates [N, K] fp32)."""
        config = self.config
        scores_NE = F.linear(x_ND.float(), self.weight)
        if config.scoring_func == "softmax":
            scores_NE = scores_NE.softmax(dim=1)
        else:
            scores_NE = scores_NE.sigmoid()
        chosen_NK = ops.select_experts(
            scores_NE.detach(),
            self.e_score_correction_bias,
            config.num_experts_per_tok,
            config.n_group,
            config.topk_group,
            by_best=not config.has_selection_bias,
        ).long()
        gates_NK = scores_NE.gather(1, chosen_NK)
        if config.norm_topk_prob:
            gates_NK = gates_NK / (gates_NK.sum(dim=1, keepdim=True) + 1e-20)
        return scores_NE, chosen_NK, gates_NK * config.scaling_factor


class Experts(nn.Module):
    """All routed experts of a layer, stacked; gate rows before up rows."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.act = config.hidden_act
        E, D, I = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, I))

    def forward(self, x_ND: Tensor, gates_NK: Tensor, chosen_NK: Tensor) -> Tensor:
        plan = ops.moe_plan(chosen_NK, len(self.down_proj))
        dtype = x_ND.dtype
        gate_up, down = self.gate_up_proj.to(dtype), self.down_proj.to(dtype)
        return ops.moe_experts(x_ND, gates_NK, plan, gate_up, down, self.act)


class ExpertBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts: FeedForward | None = None
        if config.n_shared_experts:
            inner = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = FeedForward(config.hidden_size, inner, config.hidden_act)

    def forward(
        self, x_ND: Tensor, docs: ops.Documents, observe: Observe
    ) -> tuple[Tensor, RouterStats]:
        scores_NE, chosen_NK, gates_NK = self.gate(x_ND)
        y_ND = self.experts(x_ND, gates_NK, chosen_NK)
        if self.shared_experts is not None:
            y_ND = y_ND + self.shared_experts(x_ND)
        counts_E = torch.bincount(chosen_NK.flatten(), minlength=scores_NE.shape[1])
        margins = loss = None
        if observe.margins:
            bias_E, chosen = self.gate.e_score_correction_bias, chosen_NK.shape[1]
            margins = margin_histogram(scores_NE.detach(), bias_E, chosen)
        if observe.balance_loss:
            loss = sequence_balance(scores_NE, chosen_NK, *document_of_token(docs))
        return y_ND, RouterStats(counts_E, margins, loss)
