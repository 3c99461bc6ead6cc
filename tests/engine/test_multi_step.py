"""Writing ahead changes when tokens come and never which."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shenhong.engine import Engine, EngineSettings, Request, Sampling, multi_step
from shenhong.engine.cache import lay_out
from shenhong.engine.sampler import sample, samplings
from shenhong.model import PreparedDecoder
from shenhong.numerics import kernels_in_use
from shenhong.numerics.cpu.decode import SAMPLING, Writing
from tests.engine.test_engine import make, make_prompts
from tests.engine.test_requests import assert_nothing_is_held, run, some_requests
from tests.model.random_configs import random_config, random_decoder

pytestmark = pytest.mark.skipif(not kernels_in_use(), reason="only the kernels write ahead")

DECODER = make(4)
LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
GROUPED = dict.fromkeys(LATENT, 0) | {
    "attention": "gqa",
    "q_lora_rank": None,
    "rope_scaling": None,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}


def hurried(decoder, *how):
    """An engine that believes a step takes no time, so that every call writes all it may."""
    engine = Engine(decoder, settings=EngineSettings(*how))

    class Fast(type(engine.multi_step)):
        pace = property(lambda self: 1e-9, lambda self, seconds: None)

    engine.multi_step.__class__ = Fast
    return engine


@given(
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    gqa=st.booleans(),
    room=st.lists(st.integers(0, 9), min_size=1, max_size=9),
    how=st.sampled_from([Sampling(0.0), Sampling(1.0), Sampling(1.3, top_k=7, top_p=0.9)]),
)
@settings(max_examples=40, deadline=None)
def test_one_call_writes_what_many_would(seed, dtype, gqa, room, how):
    """Against forward, logits and sample, token by token, each sequence on its own: equal to the bit."""
    decoder = random_decoder(random_config(seed, **(GROUPED if gqa else {})), seed)
    model = PreparedDecoder(decoder, dtype)
    assert model.fused
    prompts = make_prompts(decoder, seed, len(room), longest=20)
    points = torch.rand(len(room), 9, generator=torch.Generator().manual_seed(seed))
    rows = np.stack([samplings(how, own) for own in points])
    stop, pages = int(points[0, 0] * 50), range(4 * len(room))

    def pools():
        return model.new_pools(len(pages), 8)

    def laid(number, tokens, first=0):
        return tokens, first, list(pages[4 * number : 4 * number + 4])

    want = []
    for number, (prompt, count) in enumerate(zip(prompts, room, strict=True)):
        own, tokens, first, written = pools(), prompt, 0, []
        while len(written) < count and not {stop, 60} & set(written):
            states = model.forward(lay_out([laid(number, tokens, first)]), own)
            first += len(tokens)
            tokens = sample(
                model.logits(states[-1:]), rows[number, len(written) : len(written) + 1]
            )
            written += tokens
        want.append(written)
    batch = lay_out(laid(number, prompt) for number, prompt in enumerate(prompts))
    writing = Writing(np.array(room, np.int32), rows, [(stop, 60)] * len(room))
    assert model.write(batch, pools(), writing) == want


@given(
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    gqa=st.booleans(),
    longest=st.sampled_from([2, 20]),
)
@settings(max_examples=15, deadline=None)
def test_threads_do_not_matter(seed, dtype, gqa, longest):
    """Few or many tokens, equal or unequal texts: threads share matrices, or tokens, and the texts are the same."""
    decoder = random_decoder(random_config(seed, **(GROUPED if gqa else {})), seed)
    model = PreparedDecoder(decoder, dtype)
    assert model.fused
    prompts = make_prompts(decoder, seed, 40, longest=longest)
    room, points = np.full(40, 12, np.int32), torch.rand(40, 12)
    rows = np.stack([samplings(Sampling(1.0), own) for own in points])
    batch = lay_out(
        (prompt, 0, list(range(8 * number, 8 * number + 8)))
        for number, prompt in enumerate(prompts)
    )
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            writing = Writing(room, rows, [()] * 40)
            found.append(model.write(batch, model.new_pools(320, 4), writing))
    finally:
        torch.set_num_threads(threads)
    assert found[1:] == found[:1] * 3


@pytest.mark.parametrize("how", [(), (3, 4 << 10, 9), (4, 0, 512, 3, False)])
def test_texts_do_not_depend_on_how_far_ahead_they_are_written(how, monkeypatch):
    requests = [
        Request(r.prompt, r.max_new_tokens, r.sampling, r.seed, r.stop_tokens, priority=r.priority)
        for r in some_requests(DECODER, 8, 14)
    ]
    with monkeypatch.context() as patch:
        patch.setattr(multi_step, "STEPS", 1)
        want = run(hurried(DECODER, *how), requests)
    engine = hurried(DECODER, *how)
    assert run(engine, requests) == want
    assert_nothing_is_held(engine)


def test_many_tokens_come_at_once_and_steps_stay_short():
    engine = hurried(DECODER)
    engine.submit(Request((3, 4, 5), 40, Sampling(), stop_tokens=()))
    sizes = [len(event.tokens) for _ in iter(lambda: engine.busy, False) for event in engine.step()]
    assert sizes == [1, 32, 7]
    slow = Engine(DECODER)
    slow.multi_step.pace = multi_step.SECONDS / 2.5
    slow.submit(Request((3, 4, 5), 9, Sampling(), stop_tokens=()))
    assert [len(slow.step()[0].tokens) for _ in range(2)] == [1, 2]


def test_a_cancelled_text_ends_between_two_calls():
    engine = hurried(DECODER, 4)
    ids = [engine.submit(Request((3, i), 60, Sampling(), stop_tokens=())) for i in range(3)]
    engine.step(), engine.step()
    engine.cancel(ids[1])
    told = engine.step()
    assert [e.finish for e in told if e.request == ids[1]] == ["cancelled"]
    while engine.busy:
        engine.step()
    assert_nothing_is_held(engine)


def test_numbers_that_are_none_end_one_text_alone():
    """A token whose embedding is not finite; whoever draws it fails, the others go on."""
    decoder = make(5, tie_word_embeddings=False)
    prompts = make_prompts(decoder, 5, 6)
    want = Engine(decoder).generate(prompts, 12, sampling=Sampling(1.0), seed=[*range(6)], stop=[])
    poison = want[2].tokens[3]
    with torch.no_grad():
        decoder.model.embed_tokens.weight[poison] = float("nan")
    engine = hurried(decoder)
    requests = [
        Request(tuple(prompt), 12, Sampling(1.0), seed, stop_tokens=())
        for seed, prompt in enumerate(prompts)
    ]
    alone = [run(hurried(decoder), [request])[0] for request in requests]
    got = run(engine, requests)
    assert got == alone
    # The poison itself is still written, for it was drawn soundly; nothing can be drawn behind it.
    assert got[2] == (want[2].tokens[:4], "error")
    assert [finish for _, finish in got].count("length") >= 2
    assert_nothing_is_held(engine)


def test_a_page_before_what_is_no_number_stays_sound():
    """Sound tokens that are computed together with a poisoned one, and a text that takes over their page."""
    decoder = make(6, num_hidden_layers=2, tie_word_embeddings=False)
    with torch.no_grad():
        decoder.model.embed_tokens.weight[7] = float("nan")
    sound = [t for t in make_prompts(decoder, 6, 1, longest=20)[0] * 9 if t != 7][:5]
    for dtype in (torch.float32, torch.bfloat16):
        engine = Engine(decoder, dtype=dtype, settings=EngineSettings(page=4))
        request = Request(tuple(sound), 12, Sampling(1.0), 3, stop_tokens=())
        (want,) = run(Engine(decoder, dtype=dtype), [request])
        assert want[1] == "length" or 7 in want[0]
        poisoned = Request((*sound[:4], 7), 2, Sampling(1.0), 3, stop_tokens=())
        assert run(engine, [poisoned]) == [([], "error")]
        assert run(engine, [request]) == [want]
        assert engine.stats().prefix_hits == 4


def test_limits_beyond_the_kernels_numbers_are_as_good_as_none():
    rows = samplings(Sampling(1e300, top_k=2**40), torch.zeros(1))
    assert rows["top_k"][0] == 2**31 - 1 and np.isfinite(rows["temperature"][0])


def test_the_record_is_the_kernels():
    assert SAMPLING.itemsize == 24 and SAMPLING.fields["uniform"][1] == 16
