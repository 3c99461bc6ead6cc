"""Requests and events: whatever happens in between, each text is what it would be alone, and no page is lost."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shenhong.engine import Engine, EngineSettings, Request, Sampling
from shenhong.errors import RequestError
from shenhong.numerics import documents, kernels_in_use, use_kernels
from tests.engine.test_engine import make, make_prompts

HOWS = [
    Sampling(temperature=0),
    Sampling(1.0),
    Sampling(1.3, top_k=7),
    Sampling(0.9, top_p=0.8, repetition_penalty=1.3, frequency_penalty=0.4),
    Sampling(1.0, min_p=0.05, presence_penalty=0.7, logit_bias={3: 2.0, 5: -100.0}),
]


def some_requests(decoder, seed, count):
    pick = random.Random(seed)
    begin = make_prompts(decoder, seed, 3, longest=20)
    return [
        Request(
            tuple((pick.choice(begin) + prompt)[:40]),
            pick.randint(1, 24),
            pick.choice(HOWS),
            seed=pick.randrange(1000),
            stop_tokens=pick.choice([None, (), (2, 7)]),
            logprobs=pick.choice([None, 0, 3]),
            priority=pick.choice([0, 0, 1]),
        )
        for prompt in make_prompts(decoder, seed + 1, count, longest=20)
    ]


def run(engine, requests, cancels=()):
    """(tokens, finish) of each; ``cancels``: (step, number of the request)."""
    numbers = {engine.submit(request): i for i, request in enumerate(requests)}
    ids = list(numbers)
    tokens, ends, step = [[] for _ in requests], [None] * len(requests), 0
    while engine.busy:
        for when, number in cancels:
            if when == step:
                engine.cancel(ids[number])
        for event in engine.step():
            i = numbers[event.request]
            assert ends[i] is None, "an event after the end"
            tokens[i] += event.tokens
            ends[i] = event.finish
            if requests[i].logprobs is not None:
                assert [entry.token for entry in event.logprobs] == event.tokens
            if event.finish:
                assert event.usage.prompt_tokens == len(requests[i].prompt)
                assert event.usage.completion_tokens == len(tokens[i])
        step += 1
        assert step < 5000
    assert all(ends)
    return list(zip(tokens, ends, strict=True))


def assert_nothing_is_held(engine):
    stats = engine.stats()
    assert stats.pages_free == stats.pages and not stats.running and not stats.waiting
    assert not any(engine.pages.holders)
    pages = sorted([*engine.pages.blank, *engine.pages.idle])
    assert pages == list(range(stats.pages))
    assert set(engine.pages.name_of) == set(engine.pages.idle)


ALONE: dict[int, list] = {}
DECODERS = [make(seed, num_nextn_predict_layers=1) for seed in range(3)]


def alone(seed):
    """Each request in an engine that has nothing else to do."""
    if seed not in ALONE:
        engine = Engine(DECODERS[seed], settings=EngineSettings(share_prefixes=False))
        requests = some_requests(DECODERS[seed], seed, 14)
        ALONE[seed] = [run(engine, [request])[0] for request in requests]
    return ALONE[seed]


@given(
    seed=st.integers(0, 2),
    page=st.sampled_from([1, 3, 16]),
    pages=st.sampled_from([0, 8 << 10, 1 << 20]),
    step_tokens=st.sampled_from([1, 5, 64]),
    most_running=st.sampled_from([1, 4, 50]),
    share=st.booleans(),
    draft=st.sampled_from([0, 0, 1, 3]),
    cancels=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 13)), max_size=6),
)
@settings(max_examples=40, deadline=None)
def test_texts_do_not_depend_on_anything_else(
    seed, page, pages, step_tokens, most_running, share, draft, cancels
):
    """Batch, pieces, preemption, shared prefixes, drafting, other requests' ends: the same tokens, no page lost."""
    how = EngineSettings(page, pages, step_tokens, most_running, share, draft, most_drafting=8)
    engine = Engine(DECODERS[seed], settings=how)
    requests = some_requests(DECODERS[seed], seed, 14)
    got = run(engine, requests, cancels)
    for number, (mine, want) in enumerate(zip(got, alone(seed), strict=True)):
        if mine[1] == "cancelled":
            assert number in {n for _, n in cancels}
            assert mine[0] == want[0][: len(mine[0])]
        else:
            assert mine == want
    assert_nothing_is_held(engine)


def test_preemption_and_sharing_do_happen():
    """The property above would be empty if they did not."""
    decoder = DECODERS[0]
    engine = Engine(decoder, settings=EngineSettings(page=4, cache_bytes=0))
    prompts = [[5] * 20 + [i] for i in range(6)]
    engine.generate(prompts, 30, stop=[])
    stats = engine.stats()
    assert stats.preemptions > 0 and stats.prefix_hits >= 20
    assert stats.prompt_tokens == 6 * 21 and stats.generated_tokens == 6 * 30


def test_a_second_turn_finds_the_first():
    """A prompt that goes on from an answer computes only what is new."""
    engine = Engine(DECODERS[0], settings=EngineSettings(page=4))
    (first,) = engine.generate([[3] * 10], 12, stop=[])
    prompt = [3] * 10 + first.tokens + [7, 8]
    engine.submit(Request(tuple(prompt), 3, Sampling(), stop_tokens=()))
    usage = None
    while engine.busy:
        usage = engine.step()[-1].usage
    assert usage.cached_tokens == 20


def test_a_long_prompt_does_not_stop_the_others():
    engine = Engine(DECODERS[0], settings=EngineSettings(step_tokens=8, page=4))
    short = engine.submit(Request((3, 4), 20, Sampling(), stop_tokens=()))
    engine.step()
    long = engine.submit(Request((5,) * 60, 3, Sampling(), stop_tokens=()))
    told = [[event.request for event in engine.step()] for _ in range(9)]
    assert all(short in step for step in told)
    assert long in told[8] and not any(long in step for step in told[:8])


def test_higher_priority_goes_first():
    engine = Engine(DECODERS[0], settings=EngineSettings(most_running=1))
    first = engine.submit(Request((3,), 2, stop_tokens=()))
    low = engine.submit(Request((3,), 2, stop_tokens=()))
    high = engine.submit(Request((3,), 2, stop_tokens=(), priority=5))
    ends = []
    while engine.busy:
        ends += [event.request for event in engine.step() if event.finish]
    assert ends == [high, first, low]


def test_cancelling_frees_pages_at_once_and_strangers_are_ignored():
    engine = Engine(DECODERS[0], settings=EngineSettings(page=4, share_prefixes=False))
    id = engine.submit(Request((3,) * 30, 20, stop_tokens=()))
    engine.step()
    assert engine.stats().pages_free < engine.stats().pages
    engine.cancel(id)
    assert engine.stats().pages_free == engine.stats().pages
    (event,) = engine.step()
    assert event.finish == "cancelled" and event.usage.completion_tokens == 1
    engine.cancel(id)
    engine.cancel(12345)
    assert not engine.busy and engine.step() == []


def test_generate_and_stream_leave_other_requests_their_events():
    engine = Engine(DECODERS[1])
    request = Request((4, 5), 9, Sampling(1.0), seed=3, stop_tokens=())
    want = run(Engine(DECODERS[1]), [request])[0][0]
    id = engine.submit(request)
    engine.generate([[7]] * 3, 4)
    stream = engine.stream([9], 30, stop=[])
    next(stream)
    stream.close()
    tokens = []
    while engine.busy:
        for event in engine.step():
            assert event.request == id
            tokens += event.tokens
    assert tokens == want
    assert_nothing_is_held(engine)


def test_logprobs_are_the_model_s_own():
    decoder = DECODERS[2]
    engine = Engine(decoder)
    engine.submit(Request((3, 4, 5), 4, Sampling(0.5, top_k=2), logprobs=5, stop_tokens=()))
    entries, tokens = [], [3, 4, 5]
    while engine.busy:
        for event in engine.step():
            entries += event.logprobs
    for entry in entries:
        row = torch.tensor([tokens])
        with torch.no_grad():
            states = decoder(row.flatten(), documents(row, -1)).states_ND
        want = decoder.logits(states[-1]).log_softmax(0)
        assert entry.logprob == pytest.approx(want[entry.token].item(), abs=1e-4)
        assert [t for t, _ in entry.top] == want.topk(5).indices.tolist()
        assert [p for _, p in entry.top] == pytest.approx(want.topk(5).values.tolist(), abs=1e-4)
        tokens.append(entry.token)


def test_without_kernels_the_texts_are_the_same():
    """Up to rounding, which these seeds do not meet."""
    if not kernels_in_use():
        pytest.skip("there is only one way here")
    want = alone(0)
    use_kernels(False)
    try:
        engine = Engine(DECODERS[0], settings=EngineSettings(page=4, step_tokens=16))
        assert run(engine, some_requests(DECODERS[0], 0, 14)) == want
    finally:
        use_kernels(True)


def test_bfloat16_texts_do_not_depend_on_their_batch_either():
    if not kernels_in_use():
        pytest.skip("plain PyTorch rounds differently in other batches")
    for seed, decoder in enumerate(DECODERS):
        requests = some_requests(decoder, seed, 14)
        want = [run(Engine(decoder, dtype=torch.bfloat16), [request])[0] for request in requests]
        how = EngineSettings(page=3, cache_bytes=4 << 10, step_tokens=7, draft=2, most_drafting=5)
        assert run(Engine(decoder, dtype=torch.bfloat16, settings=how), requests) == want


# Where PyTorch's own bfloat16 products serve: share of the logits' spread within which two batches may disagree.
MARGIN = 0.03


def test_bfloat16_without_kernels_diverges_only_where_it_was_close():
    use_kernels(False)
    try:
        for seed, decoder in enumerate(DECODERS):
            prompts = make_prompts(decoder, seed, 12)
            together = Engine(decoder, dtype=torch.bfloat16)
            crowd = together.generate(prompts, 20, sampling=HOWS[0], stop=[])
            engine = Engine(decoder, dtype=torch.bfloat16)
            for prompt, many in zip(prompts, crowd, strict=True):
                (one,) = engine.generate([prompt], 20, sampling=HOWS[0], stop=[])
                at = next((i for i in range(20) if one.tokens[i] != many.tokens[i]), None)
                if at is None:
                    continue
                row = torch.tensor([prompt + one.tokens[:at]])
                with torch.no_grad():
                    states = decoder(row.flatten(), documents(row, -1)).states_ND
                logits = decoder.logits(states[-1])
                gap = logits[one.tokens[at]] - logits[many.tokens[at]]
                assert abs(gap) <= MARGIN * (logits.max() - logits.min())
    finally:
        use_kernels(True)


def test_calibration_picks_a_depth_and_changes_no_text():
    engine = Engine(DECODERS[0])
    want = engine.generate([[3, 4]], 12, seed=1, stop=[])
    report = engine.calibrate([3, 4, 5], tokens=12, deepest=2)
    assert set(report.speedups) == {0, 1, 2} and report.speedups[0] == 1
    assert report.speedup == max(report.speedups.values()) >= 1
    assert engine.drafter.depth == report.depth and (report.depth or report.speedup == 1)
    assert engine.generate([[3, 4]], 12, seed=1, stop=[]) == want
    plain = Engine(make(0, num_nextn_predict_layers=0))
    assert plain.calibrate([3]).depth == 0 and plain.drafter is None


def test_a_layer_that_guesses_well_saves_steps():
    """A model that repeats one token whatever it reads: every guess is right, so steps are few."""
    decoder = make(0, num_nextn_predict_layers=1, tie_word_embeddings=False)
    with torch.no_grad():
        decoder.lm_head.weight.zero_()  # all tokens equally likely: the first is taken
    engine = Engine(decoder, settings=EngineSettings(draft=3))
    engine.submit(Request((3, 4), 33, Sampling(temperature=0), stop_tokens=()))
    steps = 0
    while engine.busy:
        engine.step()
        steps += 1
    assert steps == 9 and engine.stats().acceptance == 1  # one, then four a step


def test_a_model_of_nan_ends_its_request_with_an_error():
    decoder = make(0)
    with torch.no_grad():
        decoder.model.norm.weight.fill_(float("nan"))
    engine = Engine(decoder)
    engine.submit(Request((3,), 5))
    (event,) = engine.step()
    assert event.finish == "error" and event.error and not engine.busy
    assert_nothing_is_held(engine)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": ()}, "0 tokens"),
        ({"prompt": (1,) * 65}, "65 tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": ("a",)}, "no tokenizer"),
        ({"stop": ("",)}, "empty"),
        ({"sampling": Sampling(logit_bias={99999: 1.0})}, "logit_bias"),
    ],
)
def test_impossible_requests_are_refused(options, words):
    engine = Engine(DECODERS[0])
    with pytest.raises(RequestError, match=words):
        engine.submit(Request(**({"prompt": (1,), "max_new_tokens": 3} | options)))
    assert not engine.busy
