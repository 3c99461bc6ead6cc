"""A run that goes on from a finished model: what it takes over, and when.

Tokenizer and shape are copied into the run at its tokenizer stage, the weights are read when training begins. From then
on the run needs the model no more: it resumes from its own checkpoints, exact as ever.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from shenhong.corpus.pack import has_prompts
from shenhong.errors import RecipeError, RunError
from shenhong.export import load_model
from shenhong.export.huggingface import TOKENIZER_FILES, read_shape
from shenhong.export.shards import tensor_files
from shenhong.model import ModelConfig
from shenhong.model.hf_config import read_config, to_hf
from shenhong.models import folder_of
from shenhong.recipe import Recipe
from shenhong.runs.files import digest
from shenhong.tokenizer import Tokenizer


def take_over(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Writes tokenizer and shape of the model ``recipe.init`` into ``folder``; what is known of them, and its hashes.

    Errors: ModelError where there is no such model, RecipeError where the recipe does not go with it.
    """
    source = _source(recipe)
    config, tokenizer = read_shape(source), Tokenizer.load(source)
    try:
        recipe.check_training(config)
    except ValueError as error:
        raise RecipeError(f"init {source}: {error}") from None
    if tokenizer.own and tokenizer.simplify != recipe.corpus.simplify:
        raise RecipeError(
            f"init {source} learnt with corpus.simplify = {str(tokenizer.simplify).lower()}; set it so here too"
        )
    (folder / "config.json").write_text(json.dumps(to_hf(config)), encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    return {
        "vocab_size": tokenizer.vocab_size,
        "init_sha256": {path.name: digest(path) for path in tensor_files(source)},
    }


def check_prompts(corpus: Path, tokenizer: Tokenizer) -> None:
    """Error: RecipeError where the corpus asks questions in a form that the model's tokenizer has no tokens for."""
    if tokenizer.own:
        return
    if has_prompts(corpus):
        raise RecipeError(
            "init: this model's tokenizer lacks the tokens that stand around a prompt; "
            'train it on plain documents (corpus.kind = "text")'
        )


def architecture(run: Path) -> ModelConfig:
    """The shape that was taken over, with the token ids that training needs."""
    tokenizer = Tokenizer.load(run / "tokenizer")
    return dataclasses.replace(
        read_config(run / "tokenizer" / "config.json"),
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )


def weights(recipe: Recipe, recorded: dict[str, str]) -> dict[str, Tensor]:
    """The model's parameters and biases. Error: RunError where it is not the one whose tokenizer was taken over."""
    source = _source(recipe)
    if {path.name: digest(path) for path in tensor_files(source)} != recorded:
        raise RunError(
            f"{source} has changed since this run took its tokenizer and shape from it; begin another run"
        )
    return load_model(source).state_dict()


def _source(recipe: Recipe) -> Path:
    assert recipe.init is not None
    source = folder_of(Path(recipe.init))
    if not source.is_dir():
        raise RecipeError(f"init {source} is no model folder; training goes on from folders only")
    return source
