"""Documents stay apart, streams of initialisation, bf16, multi-token prediction, and absorbed decoding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shenhong.errors import ModelError
from shenhong.model import Decoder, PreparedDecoder, Yarn
from shenhong.model.rope import rope_tables, rotate
from shenhong.numerics import Documents, kernels_in_use, use_kernels
from shenhong.numerics.cpu.decode import Batch
from tests.model.random_configs import (
    random_config,
    random_decoder,
    random_tokens,
    random_v2_config,
)


def flat(rows):
    """The rows as one flat batch of documents."""
    starts = torch.tensor([0] + [len(row) for row in rows]).cumsum(0).int()
    positions = torch.cat([torch.arange(len(row)) for row in rows]).int()
    return torch.cat(rows), Documents(starts, positions)


def random_rows(config, seed, lengths):
    return [random_tokens(config, seed * 10 + i, n) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("attention", ["mla", "mha"])
@pytest.mark.parametrize("seed", range(4))
def test_documents_do_not_see_each_other(seed, attention):
    config = random_config(seed, attention=attention)
    decoder = random_decoder(config, seed)
    rows = random_rows(config, seed, [7, 1, 12, 3])
    with torch.no_grad():
        together = decoder(*flat(rows)).states_ND.split([len(row) for row in rows])
        for row, states in zip(rows, together, strict=True):
            assert torch.allclose(decoder(*flat([row])).states_ND, states, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_the_future_is_not_seen(seed):
    config = random_config(seed)
    decoder = random_decoder(config, seed)
    tokens, docs = flat(random_rows(config, seed, [12]))
    changed = tokens.clone()
    changed[8:] = (changed[8:] + 1) % config.vocab_size
    with torch.no_grad():
        a, b = decoder(tokens, docs).states_ND, decoder(changed, docs).states_ND
    assert torch.allclose(a[:8], b[:8], atol=1e-5) and not torch.allclose(a[8:], b[8:], atol=1e-3)


def test_attention_depends_on_distance_only():
    config = random_config(1, rope_scaling=Yarn(4.0, 16))
    cos, sin = rope_tables(config)
    q, k = torch.randn(2, config.qk_rope_head_dim)
    dots = [rotate(q, cos[p], sin[p]) @ rotate(k, cos[p - 3], sin[p - 3]) for p in (3, 20, 60)]
    assert torch.allclose(dots[0], dots[1], atol=1e-4)
    assert torch.allclose(dots[0], dots[2], atol=1e-4)


def test_initialisation_is_named_by_seed_and_tensor():
    config = random_config(3, num_hidden_layers=2, first_k_dense_replace=1)
    a, b, c = Decoder(config, seed=1), Decoder(config, seed=1), Decoder(config, seed=2)
    dense = Decoder(random_config(3, num_hidden_layers=2, first_k_dense_replace=2), seed=1)
    name = "model.layers.1.self_attn.o_proj.weight"
    first = a.state_dict()[name]
    assert torch.equal(first, b.state_dict()[name])
    assert torch.equal(first, dense.state_dict()[name])
    assert not torch.equal(first, c.state_dict()[name])
    everything = torch.cat([p.flatten() for p in a.parameters() if p.ndim > 1])
    assert everything.std().item() == pytest.approx(config.initializer_range, rel=0.05)
    assert abs(everything.mean().item()) < config.initializer_range / 20


@pytest.mark.parametrize("attention", ["mla", "mha"])
def test_bf16_is_near_fp32_and_trains_fp32_masters(attention):
    config = random_config(5, attention=attention, num_nextn_predict_layers=1, n_routed_experts=4,
                           n_group=1, topk_group=1, num_experts_per_tok=4)  # fmt: skip
    decoder = random_decoder(config, 5)
    tokens, docs = flat(random_rows(config, 5, [12, 9]))
    exact = decoder(tokens, docs).states_ND
    decoder.compute_dtype = torch.bfloat16
    hidden = decoder(tokens, docs)
    assert hidden.states_ND.dtype == torch.bfloat16
    error = (hidden.states_ND.float() - exact).norm() / exact.norm()
    assert error < 0.05
    decoder.draft(hidden.states_ND, tokens, docs).states_ND.float().square().sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.is_leaf, name
    assert decoder.model.layers[-1].eh_proj.weight.grad.dtype == torch.float32


# ------------------------------------------------------------------ multi-token prediction


def test_draft_joins_the_next_embedding_and_the_normed_state():
    """The MTP layer written out: W [enorm(emb of token i+1); hnorm(state)], block, its own norm."""
    config = random_config(
        6, num_nextn_predict_layers=1, first_k_dense_replace=3, num_hidden_layers=3
    )
    decoder = random_decoder(config, 6)
    tokens, docs = flat(random_rows(config, 6, [10, 6]))
    layer = decoder.model.layers[-1]

    def norm(x, weight):
        return F.rms_norm(x, x.shape[-1:], weight, config.rms_norm_eps)

    with torch.no_grad():
        states = decoder(tokens, docs).states_ND
        got = decoder.draft(states, tokens, docs).states_ND
        following = F.embedding(tokens.roll(-1), decoder.model.embed_tokens.weight)
        pair = torch.cat((norm(following, layer.enorm.weight), norm(states, layer.hnorm.weight)), 1)
        x = pair @ layer.eh_proj.weight.T
        x = x + layer.self_attn(
            norm(x, layer.input_layernorm.weight), docs, decoder.cos, decoder.sin
        )
        x = x + layer.mlp(norm(x, layer.post_attention_layernorm.weight))
        want = norm(x, layer.shared_head.norm.weight)
    assert torch.allclose(got, want, atol=1e-5)


def test_draft_sees_one_token_ahead_and_no_further():
    config = random_config(6, num_nextn_predict_layers=1)
    decoder = random_decoder(config, 6)
    tokens, docs = flat(random_rows(config, 6, [12]))
    changed = tokens.clone()
    changed[8] = (changed[8] + 1) % config.vocab_size

    def draft(t):
        with torch.no_grad():
            return decoder.draft(decoder(t, docs).states_ND, t, docs).states_ND

    same = (draft(tokens) - draft(changed)).abs().amax(dim=1)
    assert same[:7].max() < 1e-5 and same[7] > 1e-3


def test_only_its_last_token_lets_a_document_see_the_next_one():
    config = random_config(6, num_nextn_predict_layers=1)
    decoder = random_decoder(config, 6)
    a, b, c = random_rows(config, 6, [8, 5, 5])

    def draft(rows):
        tokens, docs = flat(rows)
        with torch.no_grad():
            return decoder.draft(decoder(tokens, docs).states_ND, tokens, docs).states_ND

    assert torch.allclose(draft([a, b])[:7], draft([a, c])[:7], atol=1e-5)


def test_gradients_of_the_draft_reach_trunk_and_embedding():
    config = random_config(6, num_nextn_predict_layers=1, tie_word_embeddings=False)
    decoder = random_decoder(config, 6)
    tokens, docs = flat(random_rows(config, 6, [12]))
    states = decoder(tokens, docs).states_ND
    decoder.logits(decoder.draft(states, tokens, docs).states_ND).square().sum().backward()
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert dict(decoder.named_parameters())[name].grad.abs().max() > 0


# ------------------------------------------------------------------ decoding


def paged(parts, width=40):
    """A batch of (tokens, first position, pages) parts."""
    tokens = [token for part, _, _ in parts for token in part]
    positions = [first + i for part, first, _ in parts for i in range(len(part))]
    starts = np.cumsum([0] + [len(part) for part, _, _ in parts])
    tables = np.zeros((len(parts), width), np.int32)
    for row, (_, _, pages) in zip(tables, parts, strict=True):
        row[: len(pages)] = pages
    return Batch(
        np.array(tokens, np.int64), np.array(positions, np.int32), starts.astype(np.int32), tables
    )


@pytest.fixture(params=[True, False], ids=["kernels", "pytorch"])
def kernels(request):
    use_kernels(request.param)
    yield request.param
    use_kernels(True)


@pytest.mark.parametrize("seed", range(30))
def test_absorbed_decoding_equals_the_training_forward(seed, kernels):
    """Prompts of different lengths, whole and in pieces, then single tokens, mixed in batches, over scattered pages."""
    config = (random_v2_config if seed % 3 == 0 else random_config)(seed)
    decoder = random_decoder(config, seed)
    prepared = PreparedDecoder(decoder)
    assert bool(prepared.fused) == (kernels and kernels_in_use())
    a, b = (row.tolist() for row in random_rows(config, seed, [14, 12]))
    pools = prepared.new_pools(12, 4)
    pa, pb = [7, 1, 10, 3], [2, 11, 0]
    one = prepared.forward(paged([(a[:6], 0, pa)]), pools)
    two = prepared.forward(paged([(b[:7], 0, pb), (a[6:7], 6, pa)]), pools)
    three = prepared.forward(paged([(a[7:11], 7, pa), (b[7:8], 7, pb)]), pools)
    four = prepared.forward(paged([(b[8:], 8, pb), (a[11:], 11, pa)]), pools)
    with torch.no_grad():
        wants = [decoder(*flat([torch.tensor(row)])).states_ND for row in (a, b)]
    gots = [
        torch.cat((one, two[7:], three[:4], four[4:])),
        torch.cat((two[:7], three[4:], four[:4])),
    ]
    for got, want in zip(gots, wants, strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_token_s_states_do_not_depend_on_its_batch(dtype, threads):
    """To the bit: alone, in pieces of any size, in a crowd, on one thread or two."""
    if not kernels_in_use():
        pytest.skip("no compiler here")
    for seed in range(6):
        config = random_config(seed, num_nextn_predict_layers=1)
        prepared = PreparedDecoder(random_decoder(config, seed), dtype)
        (row,) = (r.tolist() for r in random_rows(config, seed, [23]))
        crowd = [r.tolist() for r in random_rows(config, seed + 1, [9] * 7)]
        pools = prepared.new_pools(40, 4)
        mine = list(range(6))
        want = prepared.forward(paged([(row, 0, mine)]), pools)
        draft = prepared.draft(want[:-1], paged([(row[1:], 0, mine)]), pools)
        head = prepared.logits(want)
        torch.set_num_threads(threads)
        try:
            others = [(r, 0, [10 + 3 * i, 11 + 3 * i, 12 + 3 * i]) for i, r in enumerate(crowd)]
            at, got = 0, []
            for piece in (1, 3, 1, 11, 7):
                part = (row[at : at + piece], at, mine)
                states = prepared.forward(paged([*others, part]), pools)
                got.append(states[9 * 7 :])
                at += piece
            got = torch.cat(got)
            assert torch.equal(got, want)
            assert torch.equal(prepared.logits(got[5:8]), head[5:8])
            again = [
                prepared.draft(want[i : i + 1], paged([(row[i + 1 : i + 2], i, mine)]), pools)
                for i in range(22)
            ]
            assert torch.equal(torch.cat(again), draft)
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("seed", range(6))
def test_drafting_equals_the_training_forward(seed, kernels):
    config = random_config(seed, num_nextn_predict_layers=1)
    decoder = random_decoder(config, seed)
    prepared = PreparedDecoder(decoder)
    (row,) = random_rows(config, seed, [12])
    pools, mine = prepared.new_pools(3, 4), [2, 0, 1]
    states = prepared.forward(paged([(row.tolist(), 0, mine)]), pools)
    got = [
        prepared.draft(states[:5], paged([(row[1:6].tolist(), 0, mine)]), pools),
        prepared.draft(states[5:11], paged([(row[6:].tolist(), 5, mine)]), pools),
    ]
    tokens, docs = flat([row])
    with torch.no_grad():
        want = decoder.draft(decoder(tokens, docs).states_ND, tokens, docs).states_ND[:11]
    assert (torch.cat(got) - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_cache_row_is_the_latent_and_one_rotated_key():
    config = random_config(9, num_nextn_predict_layers=1)
    pools = PreparedDecoder(random_decoder(config, 9)).new_pools(3, 4)
    width = config.kv_lora_rank + config.qk_rope_head_dim
    assert len(pools.layers) == config.num_hidden_layers + 1
    assert all(pool.shape == (3, 4, width) for pool in pools.layers)
    assert pools.bytes_per_token == 4 * width * len(pools.layers)


def test_a_prepared_decoder_keeps_its_weights(kernels):
    config = random_config(9)
    decoder = random_decoder(config, 9)
    prepared = PreparedDecoder(decoder)
    batch = paged([(random_rows(config, 9, [8])[0].tolist(), 0, [0, 1])])
    before = prepared.forward(batch, prepared.new_pools(2, 4))
    with torch.no_grad():
        for tensor in decoder.state_dict().values():
            tensor.add_(1.0)
    assert torch.equal(prepared.forward(batch, prepared.new_pools(2, 4)), before)


def test_multi_head_attention_has_no_latent_cache():
    with pytest.raises(ModelError, match="mla"):
        PreparedDecoder(random_decoder(random_config(2, attention="mha"), 2))
