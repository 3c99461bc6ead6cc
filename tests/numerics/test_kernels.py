"""The kernels against the references, values and gradients, in fp32 and bf16, whatever the shape.

Bounds are relative to the largest value of each tensor (inputs are of size 1; sums that cancel to under 0.5 are
held to 0.5): fp32 2e-5 (another order of summation), bf16 0.02 (two
roundings of 8 bits, where the reference rounds in other places).
"""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shenhong import numerics
from shenhong.numerics import ops, reference

BOUND = {torch.float32: 2e-5, torch.bfloat16: 0.02}
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
few = settings(max_examples=25, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def kernels():
    if not numerics.kernels_in_use():
        pytest.skip("no compiler here")


def same(op, plain, inputs, dtype):
    """Outputs and gradients under a random projection. The reference computes in fp32 from the same rounded inputs."""
    results = []
    for function, kind in ((op, dtype), (plain, torch.float32)):
        leaves = [x.detach().to(kind if x.dtype == dtype else x.dtype) for x in inputs]
        leaves = [x.clone().requires_grad_() for x in leaves]
        y = function(*leaves)
        assert y.dtype == kind or y.dim() == 0
        seed = torch.Generator().manual_seed(1)
        dy = torch.randn(y.shape, generator=seed).to(dtype).to(y.dtype)
        y.backward(dy)
        for x in leaves:
            assert x.grad is not None and x.grad.dtype == x.dtype
        results.append([y.detach(), *(x.grad for x in leaves)])
    for i, (ours, theirs) in enumerate(zip(*results, strict=True)):
        difference = (ours.float() - theirs.float()).abs().max().item()
        largest = theirs.float().abs().max().item()
        assert difference <= BOUND[dtype] * max(largest, 0.5), (i, difference, largest)


@given(rows=st.integers(1, 40), dim=st.integers(8, 70), dtype=dtypes, seed=st.integers(0, 9))
@few
def test_rms_norm(rows, dim, dtype, seed):
    torch.manual_seed(seed)
    wide = torch.randn(rows, dim + 5).to(dtype)  # a slice: rows are strided
    same(
        lambda x, w: ops.rms_norm(x[:, :dim], w, 1e-6),
        lambda x, w: reference.rms_norm(x[:, :dim], w, 1e-6),
        [wide, torch.rand(dim) + 0.5],
        dtype,
    )


@given(rows=st.integers(1, 40), dim=st.integers(1, 70), dtype=dtypes)
@few
def test_swiglu(rows, dim, dtype):
    torch.manual_seed(rows)
    same(ops.swiglu, reference.swiglu, [torch.randn(rows, 2 * dim).to(dtype) * 3], dtype)


def batch(lengths):
    tokens = torch.zeros(1, sum(lengths), dtype=torch.long)
    tokens[0, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = 1
    return ops.documents(tokens, 1)


@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    heads=st.integers(1, 3),
    plain=st.integers(1, 40),
    half=st.integers(0, 10),
    value=st.integers(1, 70),
    dtype=dtypes,
)
@few
def test_latent_attention(lengths, heads, plain, half, value, dtype):
    torch.manual_seed(plain)
    docs, rope, total = batch(lengths), 2 * half, sum(lengths)
    angle = torch.rand(70, half) * 6
    kv = torch.randn(total, heads, plain + value).to(dtype)
    inputs = [torch.randn(total, heads, plain + rope).to(dtype), kv]
    inputs.append(torch.randn(total, rope + 3).to(dtype))
    tables = docs, angle.cos(), angle.sin()

    def plain_version(q, kv, k_rope):
        shared = k_rope[:, None, :rope].expand(-1, heads, -1)
        k = torch.cat([kv[..., :plain], shared], -1)
        return reference.attention(q, k, kv[..., plain:], *tables, rope, 0.3)

    same(
        lambda q, kv, k: ops.latent_attention(q, kv, k[:, :rope], *tables, 0.3),
        plain_version,
        inputs,
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_long_documents(dtype):
    torch.manual_seed(0)
    docs, heads, rope = batch([700, 1, 2, 321]), 2, 16
    angle = torch.rand(700, rope // 2)
    same(
        lambda q, k, v: ops.attention(q, k, v, docs, angle.cos(), angle.sin(), rope, 0.1),
        lambda q, k, v: reference.attention(q, k, v, docs, angle.cos(), angle.sin(), rope, 0.1),
        [torch.randn(1024, heads, n).to(dtype) for n in (48, 48, 32)],
        dtype,
    )


@given(
    n=st.integers(24, 150),
    experts=st.integers(1, 6),
    k=st.integers(1, 3),
    dim=st.integers(6, 40),
    width=st.integers(6, 40),
    dtype=dtypes,
)
@few
def test_experts(n, experts, k, dim, width, dtype):
    torch.manual_seed(n)
    k = min(k, experts)
    chosen = ops.select_experts(torch.rand(n, experts), torch.zeros(experts), k)
    plan = ops.moe_plan(chosen, experts)
    expected = reference.moe_plan(chosen, experts)
    assert plan.assignment_A.equal(expected.assignment_A) and plan.bounds == expected.bounds
    assert plan.slot_NK.equal(expected.slot_NK) and plan.counts_E.equal(expected.counts_E)
    same(
        lambda x, g, u, d: ops.moe_experts(x, g, plan, u, d),
        lambda x, g, u, d: reference.moe_experts(x, g, plan, u, d),
        [
            torch.randn(n, dim).to(dtype),
            torch.rand(n, k),
            torch.randn(experts, 2 * width, dim).to(dtype) / dim**0.5,
            torch.randn(experts, dim, width).to(dtype) / width**0.5,
        ],
        dtype,
    )


@given(
    n=st.integers(1, 60),
    groups=st.sampled_from([1, 2, 4]),
    size=st.integers(1, 5),
    seed=st.integers(0, 9),
    by_best=st.booleans(),
)
@few
def test_selection_with_many_ties(n, groups, size, seed, by_best):
    torch.manual_seed(seed)
    experts, kept = groups * size, (groups + 1) // 2
    scores = torch.randint(0, 4, (n, experts)) / 4
    bias = torch.randint(0, 3, (experts,)) / 4
    k = min(3, kept * size)
    ours = ops.select_experts(scores, bias, k, groups, kept, by_best)
    assert ours.equal(reference.select_experts(scores, bias, k, groups, kept, by_best))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens,vocabulary", [(7, 11), (300, 40_000), (200, 6007)])
def test_cross_entropy(tokens, vocabulary, dtype, enabled):
    """Several chunks, a vocabulary that is not a multiple of a vector, tokens that do not count; PyTorch chunks too."""
    torch.manual_seed(tokens)
    targets = torch.randint(0, vocabulary, (tokens,))
    weights = torch.rand(tokens) * (torch.rand(tokens) > 0.3)
    inputs = [torch.randn(tokens, 24).to(dtype), torch.randn(vocabulary, 24).to(dtype) / 3]
    numerics.use_kernels(enabled)
    try:
        same(
            lambda h, w: ops.cross_entropy(h, w, targets, weights)[0],
            lambda h, w: reference.cross_entropy(h, w, targets, weights)[0],
            inputs,
            dtype,
        )
        with torch.no_grad():
            ours = ops.cross_entropy(*inputs, targets, weights)[1]
    finally:
        numerics.use_kernels(True)
    theirs = reference.cross_entropy(*(x.float() for x in inputs), targets, weights)[1]
    torch.testing.assert_close(ours, theirs, rtol=BOUND[dtype], atol=BOUND[dtype] * 3)


def test_nothing_counted_costs_nothing_and_has_no_gradient():
    h = torch.randn(5, 8, requires_grad=True)
    w = torch.randn(9, 8, requires_grad=True)
    loss, logprob = ops.cross_entropy(h, w, torch.zeros(5, dtype=torch.long), torch.zeros(5))
    loss.backward()
    assert loss.item() == 0 and not logprob.any() and not h.grad.any() and not w.grad.any()


def test_nan_is_not_hidden():
    x = torch.randn(70, 32)
    x[3, 5] = float("nan")
    assert ops.rms_norm(x, torch.ones(32), 1e-6)[3].isnan().all()
    assert ops.swiglu(x)[3, 5].isnan()
    loss, _ = ops.cross_entropy(x, torch.randn(9, 32), torch.zeros(70).long(), torch.ones(70))
    assert loss.isnan()


def test_bits_repeat_for_a_fixed_thread_count():
    def once():
        torch.manual_seed(0)
        docs = batch([50, 60, 70])
        q = torch.randn(180, 2, 24).bfloat16().requires_grad_()
        kv = torch.randn(180, 2, 32).bfloat16().requires_grad_()
        rope = torch.randn(180, 8).bfloat16().requires_grad_()
        angle = torch.rand(70, 4)
        ops.latent_attention(q, kv, rope, docs, angle.cos(), angle.sin(), 0.2).sum().backward()
        return q.grad, kv.grad, rope.grad

    for first, second in zip(once(), once(), strict=True):
        assert first.equal(second)


@pytest.mark.parametrize("flags", ["-O2 -mavx2 -mfma", "-O1"])
def test_other_instruction_sets(flags):
    """All of the above once more, compiled for AVX2 and for the compiler's baseline."""
    if "-mavx2" in flags and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("no AVX2 here")
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__]
    command += ["-k", "not instruction_sets and not compiler"]
    environment = os.environ | {"SHENHONG_KERNEL_FLAGS": flags, "SHENHONG_KERNELS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "...." in done.stdout and "ss" not in done.stdout, "the kernels were not used"


def test_without_a_compiler_the_reference_serves():
    code = (
        "import torch; from shenhong import numerics;"
        "x = torch.randn(3, 8);"
        "print(numerics.kernels_in_use(), numerics.rms_norm(x, torch.ones(8), 1e-6).shape)"
    )
    environment = os.environ | {"CXX": "no-such-compiler", "SHENHONG_KERNELS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    assert "False torch.Size([3, 8])" in done.stdout
    assert done.stderr.count("\n") == 1 and "no g++" in done.stderr
