"""Reinforcement in miniature: one engine writes, an objective of its own learns from the outcome, the engine takes the weights."""

from __future__ import annotations

from pathlib import Path

import torch

from shenhong.engine import Engine, Sampling
from shenhong.export import load_model
from shenhong.model.hf_config import read_config
from shenhong.numerics import cross_entropy
from shenhong.parallel import Mesh
from shenhong.tokenizer import Tokenizer
from shenhong.train.data import Batch
from shenhong.train.settings import TrainSettings
from shenhong.train.trainer import Trainer
from tests.conftest import Tiny

LENGTH, TEXTS = 24, 32


class PolicyGradient:
    """- sum of advantage * log p over the tokens of the answers (Williams 1992)."""

    names, weights, alone, later = ("loss",), (1.0,), (), 1.0

    def counts(self, batch, late):
        return [batch.weights_N.sum()]

    def terms(self, batch, hidden, head_VD, draft, late):
        advantages_N = batch.more["advantages"].roll(-1) * batch.weights_N.roll(-1)
        return [cross_entropy(hidden.states_ND, head_VD, batch.tokens_N.roll(-1), advantages_N)[0]]


class Rollouts:
    """What the engine writes now, rewarded by the share of its characters that are the one wished for."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, wished: str) -> None:
        self.engine, self.tokenizer, self.bos_id = engine, tokenizer, tokenizer.bos_id
        (self.wished,) = tokenizer.encode(wished)
        self.prompt = tokenizer.encode_prompt("长城")
        self.rewards: list[float] = []

    def batches(self, step, mesh, part=1):
        sampling, width = Sampling(temperature=1.0), len(self.prompt) + LENGTH
        written = self.engine.generate(
            [self.prompt] * TEXTS, LENGTH, sampling=sampling, seed=step, stop=[]
        )
        shares = torch.tensor([text.tokens.count(self.wished) / LENGTH for text in written])
        self.rewards.append(float(shares.mean()))
        tokens = torch.tensor([[*self.prompt, *text.tokens] for text in written])
        answers = (torch.arange(width) >= len(self.prompt)).float().repeat(TEXTS)
        advantages = (shares - shares.mean()).repeat_interleave(width) / (shares.std() + 1e-6)
        return [Batch(tokens.flatten(), answers, width, {"advantages": advantages})]

    def mean_context(self):
        return LENGTH / 2


def test_the_reward_rises_and_the_next_text_of_the_one_engine_changes(tiny: Tiny) -> None:
    folder = Path(tiny.run / "model")
    tokenizer, decoder = Tokenizer.load(folder), load_model(folder)
    engine = Engine(decoder)
    source = Rollouts(engine, tokenizer, "。")
    settings = TrainSettings(steps=20, lr=0.05, vector_lr=0.03, warmup=0.0, batch_tokens=1024)
    config, device = read_config(folder / "config.json"), torch.device("cpu")
    trainer = Trainer(settings, config, source, Mesh(), 1, torch.float32, device, PolicyGradient())
    trainer.model.load_state_dict(decoder.state_dict())
    before = engine.generate([source.prompt], LENGTH, seed=1)
    for step in range(20):
        trainer.step(step, 1000)
        engine.reload(trainer.model)
    assert source.rewards[-1] > source.rewards[0] + 0.2, source.rewards
    assert engine.generate([source.prompt], LENGTH, seed=1) != before
