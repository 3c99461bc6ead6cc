"""An engine that takes over new weights is, from then on, a fresh engine of these weights."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from shenhong.engine import Engine, EngineSettings, Request, Sampling
from shenhong.errors import ModelError, RequestError
from shenhong.numerics import use_kernels
from tests.engine.test_engine import make, make_prompts
from tests.engine.test_multi_step import GROUPED
from tests.model.random_configs import random_decoder

HOT = Sampling(temperature=1.0)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("shape", [{}, GROUPED, {"num_nextn_predict_layers": 1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(2))
def test_the_next_texts_are_those_of_a_fresh_engine(
    seed: int, dtype: torch.dtype, shape: dict[str, Any], kernels: bool
) -> None:
    use_kernels(kernels)
    try:
        old = make(seed, **shape)
        new = random_decoder(old.config, seed + 100)
        settings = EngineSettings(draft=2 if old.config.num_nextn_predict_layers else 0)
        engine = Engine(old, dtype=dtype, settings=settings)
        assert not shape or bool(engine.drafter) == ("num_nextn_predict_layers" in shape)
        prompts = make_prompts(old, seed, 5)
        before = engine.generate(prompts, 12, sampling=HOT, seed=seed)
        engine.reload(new)
        fresh = Engine(new, dtype=dtype, settings=settings)
        after = engine.generate(prompts, 12, sampling=HOT, seed=seed)
        assert after == fresh.generate(prompts, 12, sampling=HOT, seed=seed) != before
        assert engine.states(prompts[0]).equal(fresh.states(prompts[0]))
        engine.reload(old)
        assert engine.generate(prompts, 12, sampling=HOT, seed=seed) == before
    finally:
        use_kernels(True)


def test_later_changes_of_the_decoder_do_not_reach_it() -> None:
    decoder = make(1)
    engine = Engine(decoder)
    prompts = make_prompts(decoder, 1, 4)
    engine.reload(decoder)
    before = engine.generate(prompts, 8)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(-1.5)
    assert engine.generate(prompts, 8) == before
    engine.reload(decoder)
    assert engine.generate(prompts, 8) != before


def test_what_cannot_be_taken_over_is_said() -> None:
    old, other = make(1), make(2)
    engine, config = Engine(old), old.config
    with pytest.raises(ModelError, match="another shape"):
        engine.reload(other)
    id = engine.submit(Request(tuple(make_prompts(old, 1, 1)[0]), 4))
    with pytest.raises(RequestError, match="1 requests are under way"):
        engine.reload(random_decoder(config, 3))
    engine.cancel(id)
    engine.reload(random_decoder(config, 3))


def test_the_old_weights_are_let_go() -> None:
    decoder = make(3)
    engine, config = Engine(decoder), decoder.config
    engine.generate(make_prompts(decoder, 3, 4), 8)

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    engine.reload(random_decoder(config, 4))
    before = tensors()
    for seed in range(5, 25):
        engine.reload(random_decoder(config, seed))
    assert tensors() <= before
    assert engine.pages.free == engine.pages.count
