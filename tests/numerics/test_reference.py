"""The references against arithmetic written out the slow and obvious way.

Shapes: N tokens, D hidden, H heads, E experts, K chosen, I expert width, V vocabulary.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3RMSNorm,
    apply_rotary_pos_emb_interleave,
)

from shenhong.numerics import reference


def test_documents_start_at_bos_and_rows():
    docs = reference.documents(torch.tensor([[7, 1, 7, 2], [3, 3, 7, 7]]), bos_id=7)
    assert docs.starts.tolist() == [0, 2, 4, 6, 7, 8]
    assert docs.positions.tolist() == [0, 1, 0, 1, 0, 1, 0, 0]


def test_rms_norm_equals_transformers():
    norm = DeepseekV3RMSNorm(24, eps=1e-6)
    norm.weight.data.uniform_(0.5, 2)
    x = torch.randn(5, 24)
    torch.testing.assert_close(reference.rms_norm(x, norm.weight, 1e-6), norm(x))


def test_rotation_equals_transformers_up_to_its_permutation():
    """transformers moves pairs to halves before rotating; dot products, all that counts, are the same."""
    tokens, dims = 9, 8
    angle = torch.arange(tokens)[:, None] * (10000.0 ** (-torch.arange(0, dims, 2) / dims))
    cos, sin = angle.cos(), angle.sin()
    q, k = torch.randn(2, tokens, 3, dims)
    full = torch.cat([cos, cos], -1)[None], torch.cat([sin, sin], -1)[None]
    assert DeepseekV3Config().rope_interleave
    theirs_q, theirs_k = apply_rotary_pos_emb_interleave(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], *full
    )
    ours_q, ours_k = (reference.rotate(t, cos, sin).transpose(0, 1)[None] for t in (q, k))
    torch.testing.assert_close(ours_q @ ours_k.mT, theirs_q @ theirs_k.mT, rtol=1e-4, atol=1e-5)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_attention_is_causal_softmax_inside_documents(lengths, seed):
    torch.manual_seed(seed)
    total, heads, plain, rope, value = sum(lengths), 2, 3, 4, 5
    tokens = torch.zeros(1, total, dtype=torch.long)
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    tokens[0, bounds[:-1]] = 1
    docs = reference.documents(tokens, 1)
    assert docs.starts.tolist() == bounds
    q, k = torch.randn(2, total, heads, plain + rope, dtype=torch.float64)
    v = torch.randn(total, heads, value, dtype=torch.float64)
    angle = torch.rand(16, rope // 2, dtype=torch.float64)
    out = reference.attention(q, k, v, docs, angle.cos(), angle.sin(), rope, 0.3)

    rotations = torch.view_as_complex(torch.stack([angle.cos(), angle.sin()], -1))

    def rotated(x, position):
        pairs = torch.view_as_complex(x[plain:].reshape(-1, 2).clone()) * rotations[position]
        return torch.cat([x[:plain], torch.view_as_real(pairs).flatten()])

    for begin, end in itertools.pairwise(bounds):
        for i in range(begin, end):
            for h in range(heads):
                query = rotated(q[i, h], i - begin)
                s = [query @ rotated(k[j, h], j - begin) * 0.3 for j in range(begin, i + 1)]
                p = torch.stack(s).softmax(0)
                torch.testing.assert_close(out[i, h], p @ v[begin : i + 1, h])


@given(
    n=st.integers(1, 200), experts=st.integers(1, 9), k=st.integers(1, 3), seed=st.integers(0, 99)
)
@settings(max_examples=30, deadline=None)
def test_plan_is_a_padded_stable_sort(n, experts, k, seed):
    torch.manual_seed(seed)
    k = min(k, experts)
    chosen = torch.rand(n, experts).argsort(-1)[:, :k]
    plan = reference.moe_plan(chosen, experts)
    assert plan.counts_E.tolist() == [(chosen == e).sum().item() for e in range(experts)]
    for e in range(experts):
        begin, end = plan.bounds[e], plan.bounds[e + 1]
        count = int(plan.counts_E[e])
        assert (end - begin) == math.ceil(count / 64) * 64
        rows = plan.assignment_A[begin:end].tolist()
        assert rows[:count] == (chosen.flatten() == e).nonzero().flatten().tolist()
        assert set(rows[count:]) <= {-1}
    slots = plan.slot_NK.flatten().long()
    assert plan.assignment_A[slots].tolist() == list(range(n * k))


def test_experts_are_the_gated_sum_of_feed_forwards():
    torch.manual_seed(0)
    n, d, e, k, width = 11, 6, 4, 2, 5
    x = torch.randn(n, d, dtype=torch.float64)
    up = torch.randn(e, 2 * width, d, dtype=torch.float64)
    down = torch.randn(e, d, width, dtype=torch.float64)
    gates = torch.rand(n, k, dtype=torch.float64)
    chosen = torch.rand(n, e).argsort(-1)[:, :k]
    y = reference.moe_experts(x, gates, reference.moe_plan(chosen, e), up, down)
    for i in range(n):
        total = torch.zeros(d, dtype=torch.float64)
        for j in range(k):
            g, u = (up[chosen[i, j]] @ x[i]).chunk(2)
            total += gates[i, j] * (down[chosen[i, j]] @ (g * g.sigmoid() * u))
        torch.testing.assert_close(y[i], total)


@pytest.mark.parametrize("best", [1, 2])
@pytest.mark.parametrize("groups,kept", [(1, 1), (4, 2), (4, 1), (2, 2)])
def test_selection_follows_the_paper(groups, kept, best):
    torch.manual_seed(groups)
    scores, bias = torch.rand(50, 16), torch.randn(16) * 0.2
    chosen = reference.select_experts(scores, bias, 3, groups, kept, by_best=best == 1)
    total = (scores + bias).tolist()
    for n in range(50):
        size = 16 // groups
        sums = [sum(sorted(total[n][g * size : (g + 1) * size])[-best:]) for g in range(groups)]
        kept_groups = sorted(range(groups), key=lambda g: (-sums[g], g))[:kept]
        eligible = [e for e in range(16) if e // size in kept_groups]
        assert chosen[n].tolist() == sorted(eligible, key=lambda e: (-total[n][e], e))[:3]


def test_selection_breaks_ties_by_the_lower_index():
    chosen = reference.select_experts(torch.full((3, 8), 0.5), torch.zeros(8), 2, 4, 1)
    assert chosen.tolist() == [[0, 1]] * 3


def test_cross_entropy_weighs_tokens():
    torch.manual_seed(0)
    h, w = torch.randn(6, 4), torch.randn(9, 4)
    targets, weights = torch.randint(0, 9, (6,)), torch.tensor([1, 0, 2, 0.5, 0, 1])
    loss, logprob = reference.cross_entropy(h, w, targets, weights)
    each = torch.nn.functional.cross_entropy(h @ w.T, targets, reduction="none")
    torch.testing.assert_close(loss, (each * weights).sum())
    torch.testing.assert_close(logprob, torch.where(weights != 0, -each, 0.0))
