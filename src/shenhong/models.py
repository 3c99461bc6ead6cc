"""What a person calls MODEL, a run folder or a finished model folder: find it, open it, describe it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from shenhong.engine import Engine, Sampling
from shenhong.errors import ModelError
from shenhong.export import load_model
from shenhong.model.counts import cache_numbers, forward_flops, parameters
from shenhong.model.hf_config import read_config
from shenhong.tokenizer import Tokenizer

KEYS_SEEN = 64  # by a token on average, where a cost depends on it


class Writer(NamedTuple):
    """A model that writes, and the tokenizer it reads with."""

    engine: Engine
    tokenizer: Tokenizer

    def answer(
        self, prompts: list[str], max_tokens: int, sampling: Sampling, seed: int
    ) -> list[str]:
        """One answer a prompt, in order. Error: RequestError."""
        ids = [self.tokenizer.encode_prompt(prompt) for prompt in prompts]
        done = self.engine.generate(ids, max_tokens, sampling=sampling, seed=seed)
        return [self.tokenizer.decode(completion.tokens) for completion in done]


def folder_of(path: Path) -> Path:
    """The Hugging Face folder MODEL means. Error: ModelError with the remedy."""
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if (path / "manifest.json").is_file():
        raise ModelError(
            f"{path} has no finished model yet; 'shenhong train {path}' goes on with it"
        )
    what = "has no config.json" if path.exists() else "does not exist"
    raise ModelError(f"{path} {what}; give a run folder such as runs/poet, or a model folder")


def open_writer(path: Path, dtype: torch.dtype = torch.float32) -> Writer:
    """Load a model for writing. float32 keeps a request's text independent of its batch."""
    folder = folder_of(path)
    tokenizer = Tokenizer.load(folder)
    return Writer(Engine(load_model(folder), tokenizer, dtype), tokenizer)


def facts(path: Path) -> dict[str, Any]:
    """What a model is and costs, for people and scripts."""
    folder = folder_of(path)
    config = read_config(folder / "config.json")
    size, cache = parameters(config), cache_numbers(config)
    tokenizer = Tokenizer.load(folder)
    layers = config.num_hidden_layers
    return {
        "folder": str(folder),
        "architecture": "DeepseekV3ForCausalLM",
        "layers": layers,
        "parameters": size.total,
        "active parameters": size.active,
        "multi-token prediction parameters": size.multitoken,
        "experts": f"{config.num_experts_per_tok} of {config.n_routed_experts} a token, {config.n_shared_experts} shared"
        if config.expert_layers
        else "none",
        f"forward FLOPs per token ({KEYS_SEEN} keys seen)": round(forward_flops(config, KEYS_SEEN)),
        "cache bytes per token (bfloat16)": 2 * cache.mla * layers,
        "cache bytes per token of multi-head attention": 2 * cache.mha * layers,
        "context": config.max_position_embeddings,
        "vocabulary": tokenizer.vocab_size,
    }
