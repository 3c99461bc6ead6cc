"""What a person calls MODEL, a run folder, a finished model folder or a GGUF file: find it, read it, describe it."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from shenhong.errors import ModelError
from shenhong.export import open_gguf, source
from shenhong.export.shards import headers
from shenhong.export.source import Source, is_gguf
from shenhong.export.verdicts import LLAMA_CPP, verdicts
from shenhong.model import ModelConfig
from shenhong.model.counts import cache_numbers, forward_flops, parameters
from shenhong.model.hf_config import FAMILIES, model_type
from shenhong.model.serving import planned

SERVED = "served here in"  # dtype, kernel or PyTorch, and why
KEYS_SEEN = 64  # by a token on average, where a cost depends on it


def open_source(path: Path) -> Source:
    """Reads all but the weights of what MODEL means. Error: ModelError."""
    return source.open_source(folder_of(path))


def folder_of(path: Path) -> Path:
    """The Hugging Face folder, or the GGUF file, that MODEL means. Error: ModelError with the remedy."""
    path = Path(path)
    if is_gguf(path) and path.is_file():
        return path
    if (path / "config.json").is_file():
        return path
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if (path / "manifest.json").is_file():
        raise ModelError(
            f"{path} has no finished model yet; 'shenhong train {path}' goes on with it"
        )
    what = "has no config.json" if path.exists() else "does not exist"
    raise ModelError(
        f"{path} {what}; give a run folder such as runs/poet, a model folder or a GGUF file"
    )


def run_of(place: Path) -> Path:
    """The run that a model folder belongs to, if it belongs to one; else the folder or file itself."""
    return place.parent if place.name == "model" else place


def facts(path: Path) -> dict[str, Any]:
    """What a model is and costs, for people and scripts."""
    place, config, tokenizer = open_source(path)
    size, cache = parameters(config), cache_numbers(config)
    layers = config.num_hidden_layers
    return {
        "file" if is_gguf(place) else "folder": str(place),
        "architecture": FAMILIES[model_type(config)].architecture,
        "layers": layers,
        "parameters": size.total,
        "active parameters": size.active,
        "multi-token prediction parameters": size.multitoken,
        "experts": f"{config.num_experts_per_tok} of {config.n_routed_experts} a token, {config.n_shared_experts} shared"
        if config.expert_layers
        else "none",
        f"forward FLOPs per token ({KEYS_SEEN} keys seen)": round(forward_flops(config, KEYS_SEEN)),
        "cache bytes per token (bfloat16)": 2 * cache.kept * layers,
        "cache bytes per token of multi-head attention": 2 * cache.mha * layers,
        "context": config.max_position_embeddings,
        "stored as": _kinds(place),
        SERVED: str(planned(config)),
        "vocabulary": tokenizer.vocab_size,
        "tokenizer": "byte-level BPE"
        + (", messages turned into simplified Chinese first" if tokenizer.simplify else ""),
        "chat template": "none: the bare text is continued"
        if tokenizer.special.template is None
        else f"{len(tokenizer.special.template)} characters",
    } | _engines(place, config)


def _kinds(place: Path) -> str:
    """How the numbers of a model's tensors are stored, the commonest kind first."""
    stored = open_gguf(place).tensors if is_gguf(place) else headers(place)
    numbers: Counter[str] = Counter()
    for tensor in stored.values():
        numbers[tensor.kind] += math.prod(tensor.shape)
    every = numbers.total()
    return ", ".join(f"{kind} {number / every:.1%}" for kind, number in numbers.most_common())


def _engines(place: Path, config: ModelConfig) -> dict[str, str]:
    """What each engine outside does with the model, by its documented requirements."""
    if is_gguf(place):
        return {f"in {LLAMA_CPP}": "opens it, the format is its own"}
    return {f"in {judged.engine}": str(judged) for judged in verdicts(config)}
