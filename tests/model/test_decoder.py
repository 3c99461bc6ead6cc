"""Documents stay apart, streams of initialisation, bf16, multi-token prediction, and absorbed decoding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shenhong.errors import ModelError
from shenhong.model import Decoder, PreparedDecoder, Yarn
from shenhong.model.rope import rope_tables, rotate
from shenhong.numerics import Documents
from tests.model.random_configs import random_config, random_decoder, random_tokens


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


@pytest.mark.parametrize("seed", range(30))
def test_absorbed_decoding_equals_the_training_forward(seed):
    """Prompts of different lengths, then one token, then several at once, then without a row."""
    config = random_config(seed)
    decoder = random_decoder(config, seed)
    lengths = [5, 1, 9]
    rows = random_rows(config, seed, [n + 6 for n in lengths])
    prepared = PreparedDecoder(decoder)
    cache = prepared.new_cache(len(rows))
    with torch.no_grad():
        want = decoder(*flat(rows)).states_ND.split([len(row) for row in rows])
    prompts = [row[:n] for row, n in zip(rows, lengths, strict=True)]
    first = prepared.prefill(*flat(prompts), cache).split(lengths)
    rest_BT = torch.stack([row[n:] for row, n in zip(rows, lengths, strict=True)])
    steps = [prepared.step(rest_BT[:, :1], cache), prepared.step(rest_BT[:, 1:4], cache)]
    cache.keep(torch.tensor([2, 0]))
    steps.append(prepared.step(rest_BT[[2, 0], 4:], cache))
    early, late = torch.cat(steps[:2], dim=1), steps[2]
    for i, n in enumerate(lengths):
        scale = want[i].abs().max().item()
        got = torch.cat((first[i], early[i]))
        assert (got - want[i][: n + 4]).abs().max().item() <= 1e-5 * scale
    for i, states in zip([2, 0], late, strict=True):
        scale = want[i].abs().max().item()
        assert (states - want[i][-2:]).abs().max().item() <= 1e-5 * scale
    assert cache.lengths_B.tolist() == [15, 11]


def test_the_cache_grows_past_its_first_block():
    config = random_config(9, max_position_embeddings=256)
    decoder = random_decoder(config, 9)
    (row,) = random_rows(config, 9, [150])
    prepared = PreparedDecoder(decoder)
    cache = prepared.new_cache(1)
    prepared.prefill(*flat([row[:20]]), cache)
    got = torch.cat([prepared.step(part[None], cache)[0] for part in row[20:].split(10)])
    with torch.no_grad():
        want = decoder(*flat([row])).states_ND[20:]
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    assert cache.slots[0].shape[2] == config.kv_lora_rank + config.qk_rope_head_dim


def test_a_prepared_decoder_keeps_its_weights():
    config = random_config(9)
    decoder = random_decoder(config, 9)
    prepared = PreparedDecoder(decoder)
    rows = flat(random_rows(config, 9, [8]))
    before = prepared.prefill(*rows, prepared.new_cache(1))
    with torch.no_grad():
        for tensor in decoder.state_dict().values():
            tensor.add_(1.0)
    assert torch.equal(prepared.prefill(*rows, prepared.new_cache(1)), before)


def test_multi_head_attention_has_no_latent_cache():
    with pytest.raises(ModelError, match="mla"):
        PreparedDecoder(random_decoder(random_config(2, attention="mha"), 2))
