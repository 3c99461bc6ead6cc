"""The recipe: one TOML file that says everything about a model, from raw text to evaluation.

Every setting has a type, a unit, bounds and a default; a key that is not one is an error that names the
nearest that is. Relative corpus paths are relative to the recipe's own folder. The resolved recipe is
frozen into the run folder, so that a run never depends on the file it came from again.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shenhong.corpus.settings import CorpusSettings
from shenhong.errors import ModelError, RecipeError
from shenhong.evaluate.settings import EvaluateSettings
from shenhong.model.config import ModelConfig
from shenhong.runs.files import beside
from shenhong.tokenizer import TokenizerSettings
from shenhong.train.settings import TrainSettings


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSettings(Settings):
    """Shape of the decoder, in the names of Hugging Face's ``deepseek_v3`` configuration."""

    attention: Literal["mla", "mha"] = Field(
        "mla", description="latent attention (V2, eq. 9-19), or plain multi-head for ablations"
    )
    hidden_size: int = Field(256, ge=16, le=16384)
    num_hidden_layers: int = Field(6, ge=1, le=256)
    first_k_dense_replace: int = Field(
        1,
        ge=0,
        description="leading layers with a dense MLP; num_hidden_layers makes the whole model dense",
    )
    intermediate_size: int = Field(1024, ge=16, description="width of the dense MLP")
    num_attention_heads: int = Field(4, ge=1, le=256)
    q_lora_rank: int | None = Field(
        None, ge=8, description="query latent; absent means a plain query projection"
    )
    kv_lora_rank: int = Field(64, ge=8)
    qk_nope_head_dim: int = Field(64, ge=8)
    qk_rope_head_dim: int = Field(32, ge=2, description="even: rotated in pairs")
    v_head_dim: int = Field(64, ge=8)
    n_routed_experts: int = Field(16, ge=2)
    num_experts_per_tok: int = Field(2, ge=1)
    n_shared_experts: int = Field(1, ge=0)
    moe_intermediate_size: int = Field(192, ge=8, description="width of one expert")
    scoring_func: Literal["sigmoid", "softmax"] = Field(
        "sigmoid", description="gates of DeepSeek-V3, or of DeepSeek-V2"
    )
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = Field(
        "noaux_tc", description="choice with a selection bias (V3), or without (V2)"
    )
    n_group: int = Field(1, ge=1)
    topk_group: int = Field(1, ge=1)
    norm_topk_prob: bool = True
    routed_scaling_factor: float | Literal["auto"] = Field(
        "auto", description="'auto' gives routed output the variance of one expert"
    )
    num_nextn_predict_layers: int = Field(1, ge=0, le=1, description="multi-token prediction depth")
    max_position_embeddings: int = Field(1024, ge=16)
    rope_theta: float = Field(10000.0, gt=1)
    rms_norm_eps: float = Field(1e-6, gt=0)
    initializer_range: float = Field(0.02, gt=0)
    tie_word_embeddings: bool = False


class Recipe(Settings):
    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w.-]+$")
    seed: int = Field(1, ge=0, lt=2**31)
    minutes: float | None = Field(
        None,
        gt=0,
        description="wall-clock of the whole run; the training stage gets what others leave",
    )
    reserve_seconds: float = Field(
        45.0, ge=0, description="part of the minutes kept for what follows training"
    )
    init: str | None = Field(
        None,
        min_length=1,
        description="a finished model whose training goes on: it brings tokenizer and shape, so [tokenizer] and [model] are absent",
    )
    corpus: CorpusSettings
    tokenizer: TokenizerSettings = TokenizerSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @model_validator(mode="after")
    def fits_together(self) -> Recipe:
        if self.minutes is None and self.train.steps is None:
            raise ValueError("give either minutes (of the whole run) or train.steps")
        if self.train.batch_tokens % self.train.sequence_length:
            raise ValueError(
                f"train.batch_tokens {self.train.batch_tokens} must be a multiple of train.sequence_length {self.train.sequence_length}"
            )
        if self.init is not None:
            brought = sorted({"tokenizer", "model"} & self.model_fields_set)
            if brought:
                raise ValueError(
                    f"init brings its own tokenizer and shape: remove [{brought[0]}], or init"
                )
            return self
        try:
            config = self.architecture(self.tokenizer.vocab_size)
        except ModelError as error:
            raise ValueError(f"model: {error}") from None
        self.check_training(config)
        return self

    def check_training(self, config: ModelConfig) -> None:
        """Error: ValueError where a model of this shape cannot be trained as [train] says."""
        if self.train.sequence_length > config.max_position_embeddings:
            raise ValueError(
                f"train.sequence_length {self.train.sequence_length} is above model.max_position_embeddings {config.max_position_embeddings}"
            )
        if not config.expert_layers:
            return
        if not config.has_selection_bias and self.train.balance != "none":
            raise ValueError(
                f'train.balance "{self.train.balance}" moves a selection bias, which softmax gates do not have; set it to "none" and balance by train.sequence_balance (DeepSeek-V2 took 0.003)'
            )
        groups = config.n_group
        if self.train.balance == "quantile" and config.topk_group < groups:
            raise ValueError(
                f'train.balance "quantile" knows no group limits (model.topk_group {config.topk_group} of {groups}); set it to "centred", or model.topk_group to {groups}'
            )

    def architecture(self, vocab_size: int, **token_ids: Any) -> ModelConfig:
        """The model's configuration for a tokenizer of ``vocab_size`` entries. Error: ModelError."""
        return ModelConfig(vocab_size=vocab_size, **self.model.model_dump(), **token_ids)

    def dump(self, folder: Path) -> str:
        """The resolved recipe as TOML for a file in ``folder`` (absent values are left out)."""
        brought = {"tokenizer", "model"} if self.init else set()
        tree = self.model_dump(mode="json", exclude_none=True, exclude=brought)
        if self.init:
            tree["init"] = beside(self.init, folder)
        tree["corpus"]["paths"] = [beside(path, folder) for path in self.corpus.paths]
        return tomli_w.dumps(tree)


def load(path: Path, changes: list[str] | None = None) -> Recipe:
    """Read a recipe file and apply ``section.key=value`` changes. Error: RecipeError, one line."""
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise RecipeError(
            f"{path} does not exist; give a recipe file such as recipes/poet.toml"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"{path} cannot be read as text ({error}); a recipe is a TOML file"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from None
    except RecursionError:
        raise RecipeError(f"{path} nests too deeply; a recipe has sections and settings") from None
    own = tree.get("init")
    for change in changes or []:
        _apply(tree, change)
    if isinstance(tree.get("init"), str):
        # A recipe's own paths begin at its folder, one given beside it where the command was given.
        start = path.resolve().parent if tree["init"] == own else Path.cwd()
        tree["init"] = os.path.normpath(start / tree["init"])
    corpus = tree.get("corpus")
    if isinstance(corpus, dict) and isinstance(corpus.get("paths"), list):
        base = path.resolve().parent
        corpus["paths"] = [
            os.path.normpath(base / p) if isinstance(p, str) else p for p in corpus["paths"]
        ]
    return parse(tree, str(path))


def parse(tree: dict[str, Any], source: str) -> Recipe:
    """Check a parsed recipe. Error: RecipeError naming ``source``, the key and the remedy."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{source}: {_explain(error)}") from None


def _apply(tree: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    *sections, name = key.strip().split(".")
    if not equals or not name:
        raise RecipeError(
            f"--set {change}: write it as section.key=value, for example --set train.steps=200"
        )
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text.strip()  # a bare word is a string
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"--set {change}: {section} is a value, not a section")
    tree[name] = value


def _explain(error: ValidationError) -> str:
    """The first fault in words; pydantic's own text for types and bounds is plain enough to keep."""
    fault = error.errors()[0]
    where = ".".join(
        str(part)
        for part in fault["loc"]
        if part not in ("float", "int", "bool")
        and not str(part).startswith(("literal", "constrained"))
    )
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if fault["type"] == "extra_forbidden":
        known = _known_keys(Recipe, where.split(".")[:-1])
        near = difflib.get_close_matches(where.split(".")[-1], known, n=1, cutoff=0.0)
        return (
            f"unknown key {where}; did you mean {near[0]}?{more}"
            if near
            else f"unknown key {where}{more}"
        )
    if fault["type"] == "missing":
        return f"{where} is missing{more}"
    message = fault["msg"].removeprefix("Value error, ")
    if not where:
        return message
    return f"{where}: {message[0].lower()}{message[1:]}, got {fault['input']!r}{more}"


def _known_keys(kind: type[BaseModel], sections: list[str]) -> list[str]:
    for section in sections:
        field = kind.model_fields.get(section)
        if field is None or not (
            isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        ):
            return []
        kind = field.annotation
    return list(kind.model_fields)
