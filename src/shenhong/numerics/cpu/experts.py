"""Routed experts with a hand-written backward: per expert, gather -> GEMM -> gated SwiGLU -> GEMM, then one combine.

The gate multiplies the hidden layer, not the output, so its gradient is a dot product of what backward has anyway and
the experts' outputs need not be kept. Kept for backward: the input and gate_up of every assignment. An expert's
buffers are small enough to stay in cache between its GEMMs and the kernels around them.

Shapes: N tokens, D hidden, E experts, K chosen, I expert width, A padded rows of the plan, M rows of one expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from shenhong.numerics.cpu.native import call
from shenhong.numerics.reference import SEGMENT, Plan


def plan(chosen_NK: Tensor, experts: int) -> Plan:
    """reference.moe_plan by the kernels."""
    chosen = chosen_NK.long().contiguous()
    counts = torch.empty(experts, dtype=torch.int64)
    if call("shenhong_count", chosen, chosen.numel(), experts, counts):
        raise IndexError(f"an expert index lies outside 0..{experts - 1}")
    bounds = [0]
    for count in counts.tolist():
        bounds.append(bounds[-1] + -(-count // SEGMENT) * SEGMENT)
    assignment = torch.empty(bounds[-1], dtype=torch.int32)
    slot = torch.empty(chosen.shape, dtype=torch.int32)
    args = (chosen, chosen.numel(), experts, torch.tensor(bounds), assignment, slot)
    call("shenhong_place", *args)
    return Plan(assignment, slot, counts, tuple(bounds))


def select(
    scores_NE: Tensor, bias_E: Tensor, k: int, groups: int, kept: int, by_best: bool
) -> Tensor:
    """reference.select_experts by the kernel."""
    scores = scores_NE.contiguous()
    chosen = torch.empty(scores.shape[0], k, dtype=torch.int64)
    args = (scores, bias_E.contiguous(), chosen, *scores.shape, k, groups, kept, int(by_best))
    call("shenhong_select", *args, torch.get_num_threads())
    return chosen


class Experts(Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, gates_NK: Tensor, plan: Plan, up_E2ID: Tensor, down_EDI: Tensor
    ) -> Tensor:
        x_ND, gates_NK = x_ND.contiguous(), gates_NK.contiguous()
        (tokens, dim), chosen = x_ND.shape, gates_NK.shape[1]
        width, dtype, threads = down_EDI.shape[2], x_ND.dtype, torch.get_num_threads()
        total, longest = plan.bounds[-1], _longest(plan)
        gate_up_A2I = x_ND.new_empty(total, 2 * width)
        out_AD = x_ND.new_empty(total, dim)
        x_buffer, hidden_buffer = x_ND.new_empty(longest, dim), x_ND.new_empty(longest, width)
        for expert, rows, assignment in _segments(plan):
            count = len(assignment)
            x_MD, hidden_MI = x_buffer[:count], hidden_buffer[:count]
            call("shenhong_gather", dtype, x_ND, assignment, x_MD, count, dim, chosen, threads)
            torch.mm(x_MD, up_E2ID[expert].t(), out=gate_up_A2I[rows])
            args = (gate_up_A2I[rows], gates_NK, assignment, hidden_MI, count, width, threads)
            call("shenhong_gated_forward", dtype, *args)
            torch.mm(hidden_MI, down_EDI[expert].t(), out=out_AD[rows])
        y_ND = torch.empty_like(x_ND)
        call("shenhong_combine", dtype, out_AD, plan.slot_NK, y_ND, tokens, dim, chosen, threads)
        ctx.save_for_backward(x_ND, gates_NK, up_E2ID, down_EDI, gate_up_A2I)
        ctx.plan = plan
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gates_NK, up_E2ID, down_EDI, gate_up_A2I = ctx.saved_tensors
        plan, dy_ND = ctx.plan, dy_ND.contiguous()
        (tokens, dim), chosen = x_ND.shape, gates_NK.shape[1]
        width, dtype, threads = down_EDI.shape[2], x_ND.dtype, torch.get_num_threads()
        longest = _longest(plan)
        dx_AD = x_ND.new_empty(plan.bounds[-1], dim)
        x_buffer, dy_buffer = x_ND.new_empty(longest, dim), x_ND.new_empty(longest, dim)
        hidden_buffer, dhidden_buffer = x_ND.new_empty(2, longest, width)
        dgate_up_buffer = x_ND.new_empty(longest, 2 * width)
        dgates_NK = torch.empty_like(gates_NK)
        dup, ddown = torch.empty_like(up_E2ID), torch.empty_like(down_EDI)
        for expert in (plan.counts_E == 0).nonzero().flatten().tolist():
            dup[expert] = ddown[expert] = 0
        for expert, rows, assignment in _segments(plan):
            n = len(assignment)
            x_MD, dy_MD, dgate_up = x_buffer[:n], dy_buffer[:n], dgate_up_buffer[:n]
            hidden_MI, dhidden_MI = hidden_buffer[:n], dhidden_buffer[:n]
            call("shenhong_gather", dtype, dy_ND, assignment, dy_MD, n, dim, chosen, threads)
            torch.mm(dy_MD, down_EDI[expert], out=dhidden_MI)
            args = (gate_up_A2I[rows], gates_NK, assignment, dhidden_MI, dgate_up, hidden_MI)
            call("shenhong_gated_backward", dtype, *args, dgates_NK, n, width, threads)
            torch.mm(dy_MD.t(), hidden_MI, out=ddown[expert])
            torch.mm(dgate_up, up_E2ID[expert], out=dx_AD[rows])
            call("shenhong_gather", dtype, x_ND, assignment, x_MD, n, dim, chosen, threads)
            torch.mm(dgate_up.t(), x_MD, out=dup[expert])
        dx_ND = torch.empty_like(x_ND)
        call("shenhong_combine", dtype, dx_AD, plan.slot_NK, dx_ND, tokens, dim, chosen, threads)
        return dx_ND, dgates_NK, None, dup, ddown


def _longest(plan: Plan) -> int:
    return max(end - begin for begin, end in zip(plan.bounds, plan.bounds[1:], strict=False))


def _segments(plan: Plan) -> list[tuple[int, slice, Tensor]]:
    """(expert, its padded rows, their assignments) of every expert that got any."""
    rows = [slice(*pair) for pair in zip(plan.bounds, plan.bounds[1:], strict=False)]
    return [(e, r, plan.assignment_A[r]) for e, r in enumerate(rows) if r.stop > r.start]
