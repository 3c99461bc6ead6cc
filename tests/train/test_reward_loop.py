"""Reinforcement in miniature: one engine writes, an objective of its own learns from the outcome, the engine takes the weights."""

from __future__ import annotations

from pathlib import Path

import torch

from shenhong.engine import Engine, Sampling
from shenhong.export import load_model
from shenhong.model.hf_config import read_config
from shenhong.parallel import Mesh
from shenhong.tokenizer import Tokenizer
from shenhong.train.data import Batch
from shenhong.train.objectives import Objective, next_targets, token_loss
from shenhong.train.settings import TrainSettings
from shenhong.train.trainer import Trainer
from tests.conftest import Tiny

LENGTH, TEXTS = 24, 32


class PolicyGradient(Objective):
    """- sum of advantage * log p over the tokens of the answers (Williams 1992)."""

    def counts(self, batch, late):
        return [batch.weights_N.sum()]

    def terms(self, batch, forward, late):
        targets_N, answers_N = next_targets(batch)
        weights_N = answers_N * batch.extra["advantages"].roll(-1)
        return [token_loss(forward.states_ND, forward.head_VD, targets_N, weights_N)]


class Rollouts:
    """What one engine writes with the weights of the moment; the reward is how often it writes the wished-for character."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, wished: str) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        (self.wished,) = tokenizer.encode(wished)
        self.prompt = tokenizer.encode_prompt("长城")
        self.rewards: list[float] = []

    def batches(self, step, model, mesh, part=1):
        self.engine.reload(model)
        sampling, width = Sampling(temperature=1.0), len(self.prompt) + LENGTH
        written = self.engine.generate(
            [self.prompt] * TEXTS, LENGTH, sampling=sampling, seed=step, stop=[]
        )
        rewards = torch.tensor([text.tokens.count(self.wished) / LENGTH for text in written])
        self.rewards.append(float(rewards.mean()))
        tokens = torch.tensor([[*self.prompt, *text.tokens] for text in written])
        answers = (torch.arange(width) >= len(self.prompt)).float().repeat(TEXTS)
        advantages = (rewards - rewards.mean()).repeat_interleave(width) / (rewards.std() + 1e-6)
        starts = (torch.arange(width) == 0).repeat(TEXTS)
        return [Batch(tokens.flatten(), answers, starts, width, {"advantages": advantages})]

    def mean_context(self):
        return LENGTH / 2


def test_the_reward_rises_and_the_next_text_of_the_one_engine_changes(tiny: Tiny) -> None:
    folder = Path(tiny.run / "model")
    tokenizer, decoder = Tokenizer.load(folder), load_model(folder)
    engine = Engine(decoder)
    source = Rollouts(engine, tokenizer, "。")
    settings = TrainSettings(steps=20, lr=0.05, vector_lr=0.03, warmup=0.0, batch_tokens=1024)
    config, device = read_config(folder / "config.json"), torch.device("cpu")
    trainer = Trainer(settings, config, PolicyGradient(), source, Mesh(), 1, torch.float32, device)
    trainer.model.load_state_dict(decoder.state_dict())
    before = engine.generate([source.prompt], LENGTH, seed=1)
    for step in range(20):
        trainer.step(step, 1000)
    assert source.rewards[-1] > source.rewards[0] + 0.2, source.rewards
    assert engine.generate([source.prompt], LENGTH, seed=1) != before
