"""Small model folders with a tokenizer that really tokenizes, for the tests of what is exported."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from shenhong.export import save_model
from shenhong.export.shards import MULTITOKEN, SINGLE, tensor_files
from shenhong.model import Decoder, ModelConfig
from shenhong.tokenizer import Tokenizer, TokenizerSettings
from shenhong.tokenizer.tokenizer import train
from tests.model.random_configs import random_config, random_decoder

TEXT = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。 The quick brown fox jumps over 13 lazy dogs.\n"


@cache
def small_tokenizer() -> Tokenizer:
    """320 tokens: five special ones, all bytes, some merges."""
    return train([TEXT * 20], TokenizerSettings(vocab_size=320, train_characters=10_000))


def small_config(seed: int, **fixed) -> ModelConfig:
    """A random shape whose rows divide into blocks of 32, and that llama.cpp knows."""
    values = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "rope_scaling": None,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return random_config(seed, **(values | fixed))


def small_folder(path: Path, config: ModelConfig, seed: int = 0) -> tuple[Path, Decoder]:
    """A finished model folder at ``path`` with random weights, and its decoder."""
    small_tokenizer().save(path.with_name(f"{path.name}-tokenizer"))
    decoder = random_decoder(config, seed).eval()
    save_model(decoder, path, path.with_name(f"{path.name}-tokenizer"))
    return path, decoder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, whichever file they are in."""
    return {
        name: tensor for file in tensor_files(folder) for name, tensor in load_file(file).items()
    }


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a folder; then they all are in one file, as in folders that others write."""
    tensors = tensors_of(folder)
    change(tensors)
    (folder / MULTITOKEN).unlink(missing_ok=True)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
