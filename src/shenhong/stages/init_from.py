"""A run that goes on from a finished model, folder or GGUF file: what it takes over, and when.

Before the first stage the model is looked at, all but its numbers. Tokenizer, shape and defaults of generation are
written into the run at its tokenizer stage, the weights are read when training begins. From then on the run needs the model no more: it resumes from its own checkpoints, exact as ever.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from shenhong import domains
from shenhong.corpus.pack import has_prompts
from shenhong.errors import ModelError, RecipeError, RunError
from shenhong.export.huggingface import GENERATION
from shenhong.export.source import Source
from shenhong.model import ModelConfig
from shenhong.model.hf_config import read_config, to_hf
from shenhong.models import open_source
from shenhong.recipe import Recipe
from shenhong.runs.files import digest
from shenhong.tokenizer import Tokenizer

_NO_PROMPTS = (
    "init: this model's tokenizer lacks the tokens that stand around a prompt; "
    'train it on plain documents (corpus.kind = "text")'
)


def looked_at(recipe: Recipe) -> tuple[Source, ModelConfig]:
    """The model ``recipe.init`` and its shape, once all is known to fit together that can be known without its numbers.

    Errors: ModelError where there is no such model or it is damaged, RecipeError where the recipe does not go with it.
    """
    assert recipe.init is not None
    source = _opened(recipe)
    config, tokenizer = source.check(), source.tokenizer
    try:
        recipe.check_training(config)
        to_hf(config)  # as the new model will be saved
    except ValueError as error:
        raise RecipeError(f"init {source.path}: {error}") from None
    kinds = {recipe.corpus.kind, *(step.corpus.kind for step in recipe.steps if step.corpus)}
    if not tokenizer.own and any(domains.domain(kind).single_turn for kind in kinds):
        raise RecipeError(_NO_PROMPTS)
    if tokenizer.own and tokenizer.simplify != recipe.corpus.simplify:
        raise RecipeError(
            f"init {source.path} learnt with corpus.simplify = {str(tokenizer.simplify).lower()}; set it so here too"
        )
    return source, config


def take_over(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Writes all but the weights of the model ``recipe.init`` into ``folder``; what is known of them, and their hashes.

    Errors: as `looked_at`.
    """
    source, config = looked_at(recipe)
    source.write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(to_hf(config)), encoding="utf-8")
    said, eos = source.generation(config), source.tokenizer.eos_id
    ends = said.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends] if ends is not None else []
    if eos not in ends:  # what documents will end with
        said["eos_token_id"] = [*ends, eos]
    (folder / GENERATION).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    return {"vocab_size": source.tokenizer.vocab_size, "init_sha256": _digests(source)}


def check_prompts(corpus: Path, tokenizer: Tokenizer) -> None:
    """Error: RecipeError where the corpus asks questions in a form that the model's tokenizer has no tokens for."""
    if tokenizer.own:
        return
    if has_prompts(corpus):
        raise RecipeError(_NO_PROMPTS)


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
    assert recipe.init is not None
    source = _opened(recipe)
    if _digests(source) != recorded:
        raise RunError(
            f"{source.path} has changed since this run took its tokenizer and shape from it; begin another run"
        )
    return source.decoder().state_dict()


def _digests(source: Source) -> dict[str, str]:
    return {path.name: digest(path) for path in source.weights()}


def _opened(recipe: Recipe) -> Source:
    """Error: ModelError, which says that it is the recipe's init that is wrong."""
    assert recipe.init is not None
    try:
        return open_source(Path(recipe.init))
    except ModelError as error:
        raise ModelError(f"init: {error} (--set init=PATH)") from None
