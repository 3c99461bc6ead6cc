"""The engine against plain re-computation, and the independence of a request from its batch."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from shenhong.engine import Engine, EngineSettings, Sampling, request_seed
from shenhong.engine.sampler import sample_alike, uniforms
from shenhong.errors import RequestError
from shenhong.export import save_model
from shenhong.numerics import documents
from tests.model.random_configs import random_config, random_decoder

GREEDY = Sampling(temperature=0)


def make(seed, **fixed):
    config = random_config(seed, **({"eos_token_id": 1, "max_position_embeddings": 64} | fixed))
    return random_decoder(config, seed)


def make_prompts(decoder, seed, count, longest=12):
    pick = random.Random(seed)
    return [
        [pick.randrange(decoder.config.vocab_size) for _ in range(pick.randint(1, longest))]
        for _ in range(count)
    ]


def recompute(decoder, prompt, count, how, seed, stops):
    """The same text by running the whole training forward anew for every token."""
    text, numbers = list(prompt), uniforms([seed], count)
    for step in range(count):
        tokens = torch.tensor([text])
        with torch.no_grad():
            states = decoder(tokens.flatten(), documents(tokens, -1)).states_ND
        token = int(sample_alike(decoder.logits(states[-1:]).detach(), numbers[:, step], how))
        if token in stops:
            return text[len(prompt) :], "stop"
        text.append(token)
    return text[len(prompt) :], "length"


@pytest.mark.parametrize(
    "how", [GREEDY, Sampling(1.0), Sampling(0.7, top_k=9, top_p=0.9, min_p=0.05)]
)
@pytest.mark.parametrize("seed", range(5))
def test_equals_recomputing_everything(seed, how):
    decoder = make(seed)
    prompts = make_prompts(decoder, seed, 6)
    stops = [1, 5, 9]
    got = Engine(decoder).generate(prompts, 20, sampling=how, seed=seed, stop=stops)
    for i, (prompt, done) in enumerate(zip(prompts, got, strict=True)):
        own = request_seed(seed, i)
        assert (done.tokens, done.finish) == recompute(decoder, prompt, 20, how, own, stops)


@pytest.mark.parametrize("seed", range(5))
def test_a_text_does_not_depend_on_its_batch(seed):
    """Alone, in a shuffled batch, in small batches, as a stream: the same tokens."""
    decoder = make(seed)
    prompts = make_prompts(decoder, seed, 40)
    seeds = list(range(100, 140))
    how = Sampling(1.0)
    stops = list(range(5))
    together = Engine(decoder).generate(prompts, 30, sampling=how, seed=seeds, stop=stops)
    assert {done.finish for done in together} == {"stop", "length"}
    order = random.Random(seed).sample(range(40), 40)
    small = Engine(decoder, settings=EngineSettings(most_running=7))
    shuffled = small.generate(
        [prompts[i] for i in order], 30, sampling=how, seed=[seeds[i] for i in order], stop=stops
    )
    for i, done in zip(order, shuffled, strict=True):
        assert done == together[i]
    for i in range(4):
        streamed = small.stream(prompts[i], 30, sampling=how, seed=seeds[i], stop=stops)
        assert list(streamed) == together[i].tokens


def test_seeds_matter():
    decoder = make(0)
    engine = Engine(decoder)
    prompts = [[3, 4]] * 4
    a, b, c = (engine.generate(prompts, 12, sampling=Sampling(1.5), seed=s) for s in (1, 1, 2))
    assert a == b and a != c
    assert len({tuple(done.tokens) for done in a}) > 1


def test_the_model_s_eos_ends_a_text_and_is_no_part_of_it():
    decoder = make(0, tie_word_embeddings=False)
    engine = Engine(decoder)
    (free,) = engine.generate([[3, 4]], 10, sampling=GREEDY, stop=[])
    assert len(free.tokens) == 10 and free.finish == "length"
    decoder = make(0, tie_word_embeddings=False, eos_token_id=free.tokens[3])
    (done,) = Engine(decoder).generate([[3, 4]], 10, sampling=GREEDY)
    assert done.finish == "stop"
    assert done.tokens == free.tokens[: free.tokens.index(free.tokens[3])]


def test_texts_end_where_the_context_does():
    decoder = make(2, max_position_embeddings=16)
    prompts = [[3] * 15, [4] * 16, [5] * 2]
    done = Engine(decoder).generate(prompts, 40, sampling=Sampling(1.0), stop=[])
    assert [len(d.tokens) for d in done] == [2, 1, 15]
    assert {d.finish for d in done} == {"length"}
    assert len(list(Engine(decoder).stream([3] * 15, 40, stop=[]))) == 2
    # One full row among many that go on must leave the batch at once.
    crowd = Engine(decoder).generate([[4] * 16] + [[5] * 2] * 20, 40, stop=[])
    assert [len(d.tokens) for d in crowd] == [1] + [15] * 20


def test_greedy_equals_transformers(tmp_path):
    decoder = make(4, n_shared_experts=1, num_hidden_layers=2, first_k_dense_replace=1)
    save_model(decoder, tmp_path / "model")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    for prompt in make_prompts(decoder, 4, 5):
        theirs = other.generate(
            torch.tensor([prompt]), max_new_tokens=15, do_sample=False, pad_token_id=0
        )
        (ours,) = Engine(decoder).generate([prompt], 15, sampling=GREEDY)
        expected = theirs[0, len(prompt) :].tolist()
        assert ours.tokens == [token for token in expected if token != 1]


def test_bf16_runs_and_mostly_agrees():
    decoder = make(4, tie_word_embeddings=False)
    prompts = make_prompts(decoder, 4, 30)
    exact = Engine(decoder).generate(prompts, 1, sampling=GREEDY, stop=[])
    rough = Engine(decoder, dtype=torch.bfloat16).generate(prompts, 1, sampling=GREEDY, stop=[])
    assert sum(a == b for a, b in zip(exact, rough, strict=True)) >= 24


def test_no_prompts_give_no_texts():
    assert Engine(make(0)).generate([], 5) == []


@pytest.mark.parametrize(
    ("prompts", "count", "options", "words"),
    [
        ([[]], 5, {}, "prompt 0 has 0 tokens"),
        ([[1], [2] * 65], 5, {}, "prompt 1 has 65 tokens"),
        ([[1, 99999]], 5, {}, "outside the vocabulary"),
        ([[-1]], 5, {}, "outside the vocabulary"),
        ([[1]], 0, {}, "max_new_tokens"),
        ([[1]], 5, {"seed": [1, 2]}, "2 seeds for 1 prompts"),
    ],
)
def test_impossible_requests_are_refused(prompts, count, options, words):
    with pytest.raises(RequestError, match=words):
        Engine(make(0)).generate(prompts, count, **options)
