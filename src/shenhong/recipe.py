"""The recipe: one TOML file that says everything about a model, from raw text to evaluation.

Every setting has a type, a unit, bounds and a default; a key that is not one is an error that names the
nearest that is. Relative paths begin at the recipe's own folder, those with ~ at a home. The resolved recipe is
frozen into the run folder, so that a run never depends on the file it came from again.

What the table [corpus] may say depends on its kind, and what one of the [[steps]] may say on its own: the class that
checks a recipe is put together from the settings of its domains and its steps.
"""

from __future__ import annotations

import copy
import difflib
import os
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from shenhong.corpus.settings import CorpusSettings
from shenhong.domains import registry as domains
from shenhong.errors import ModelError, RecipeError
from shenhong.evaluate.settings import EvaluateSettings
from shenhong.model.config import ModelConfig
from shenhong.runs.files import beside
from shenhong.runs.regular import read_regular
from shenhong.stages.base import StepSettings
from shenhong.stages.registry import step_of
from shenhong.tokenizer import TokenizerSettings
from shenhong.train.settings import SHARED, TrainSettings

# Before 0.2 every recipe of a run held the settings of all kinds of text; of another kind they say nothing.
_OF_SOME_KIND = frozenset(
    [
        "min_characters",
        "max_characters",
        "max_symbol_share",
        "max_repeated_share",
        "formless",
        "rhymed",
        "title_characters",
    ]
)


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSettings(Settings):
    """Shape of the decoder, in the names of Hugging Face's ``deepseek_v3`` configuration."""

    attention: Literal["mla", "mha"] = Field(
        "mla", description="latent attention (V2, eq. 9-19), or plain multi-head for ablations"
    )
    hidden_size: int = Field(256, ge=16, le=16384, description="width of the stream of states")
    num_hidden_layers: int = Field(6, ge=1, le=256, description="blocks of attention and MLP")
    first_k_dense_replace: int = Field(
        1,
        ge=0,
        description="leading layers with a dense MLP; num_hidden_layers makes the whole model dense",
    )
    intermediate_size: int = Field(1024, ge=16, description="width of the dense MLP")
    num_attention_heads: int = Field(4, ge=1, le=256, description="heads of each attention")
    q_lora_rank: int | None = Field(
        None, ge=8, description="query latent; absent means a plain query projection"
    )
    kv_lora_rank: int = Field(
        64,
        ge=8,
        description="width of the latent that keys and values come from; what the cache holds",
    )
    qk_nope_head_dim: int = Field(64, ge=8, description="dimensions of a key without position")
    qk_rope_head_dim: int = Field(
        32, ge=2, description="dimensions of a key that carry the position; even: rotated in pairs"
    )
    v_head_dim: int = Field(64, ge=8, description="dimensions of a value")
    n_routed_experts: int = Field(16, ge=2, description="experts of a layer to choose from")
    num_experts_per_tok: int = Field(2, ge=1, description="how many of them answer a token")
    n_shared_experts: int = Field(1, ge=0, description="experts that answer every token")
    moe_intermediate_size: int = Field(192, ge=8, description="width of one expert")
    scoring_func: Literal["sigmoid", "softmax"] = Field(
        "sigmoid", description="gates of DeepSeek-V3, or of DeepSeek-V2"
    )
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = Field(
        "noaux_tc", description="choice with a selection bias (V3), or without (V2)"
    )
    n_group: int = Field(1, ge=1, description="groups that the experts are divided into")
    topk_group: int = Field(1, ge=1, description="how many groups a token may choose from")
    norm_topk_prob: bool = Field(True, description="gates of the chosen experts sum to one")
    routed_scaling_factor: float | Literal["auto"] = Field(
        "auto", description="'auto' gives routed output the variance of one expert"
    )
    num_nextn_predict_layers: int = Field(1, ge=0, le=1, description="multi-token prediction depth")
    max_position_embeddings: int = Field(1024, ge=16, description="longest text, in tokens")
    rope_theta: float = Field(10000.0, gt=1, description="base of the rotary positions")
    rms_norm_eps: float = Field(1e-6, gt=0, description="added under the root of RMSNorm")
    initializer_range: float = Field(
        0.02, gt=0, description="standard deviation of the first weights"
    )
    hidden_act: str = Field(
        "silu", description="activation of the feed-forward blocks: a file in numerics/activations"
    )
    tie_word_embeddings: bool = Field(False, description="one matrix for embedding and head")


class Recipe(Settings):
    name: str = Field(
        min_length=1,
        max_length=64,
        pattern=r"^[\w.-]+$",
        description="of the run's folder runs/NAME",
    )
    seed: int = Field(1, ge=0, lt=2**31, description="of everything random: same seed, same model")
    minutes: float | None = Field(
        None,
        gt=0,
        description="wall-clock of the whole run; the training stage gets what others leave",
    )
    reserve_seconds: float | None = Field(
        None,
        ge=0,
        description="part of the minutes kept for what follows training; absent: as much as that will take here",
    )
    init: str | None = Field(
        None,
        min_length=1,
        description="a finished model whose training goes on, a run, a model folder or a GGUF file: it brings tokenizer and shape, so [tokenizer] and [model] are absent",
    )
    corpus: CorpusSettings
    tokenizer: TokenizerSettings = TokenizerSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    steps: tuple[StepSettings, ...] = Field(
        (), description="what is done after the tokenizer, in order; absent: one pretraining"
    )

    @model_validator(mode="after")
    def fits_together(self) -> Recipe:
        self._check_steps()
        for train in self._trainings():
            if self.minutes is None and train.steps is None:
                raise ValueError("give either minutes (of the whole run) or train.steps")
            if train.batch_tokens % train.sequence_length:
                raise ValueError(
                    f"train.batch_tokens {train.batch_tokens} must be a multiple of train.sequence_length {train.sequence_length}"
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

    def _trainings(self) -> list[TrainSettings]:
        """[train], or those of the steps that train."""
        own = [getattr(step, "train", None) for step in self.steps if hasattr(step, "train")]
        return [train or self.train for train in own] if self.steps else [self.train]

    def _check_steps(self) -> None:
        """Error: ValueError where the list of steps is none that can be run one after the other."""
        names: list[str] = []
        for number, step in enumerate(self.steps):
            name = step.name or step.kind
            # One folder each, also on disks that do not tell A from a.
            if name.lower() in (other.lower() for other in names):
                raise ValueError(f"steps.{number}: two steps are called {name}; give one a name")
            if name in ("start", "corpus", "tokenizer", "evaluate", "report"):
                raise ValueError(
                    f"steps.{number}: {name} is a stage of every run; choose another name"
                )
            if step.input and step.input not in names:
                known = ", ".join(names) or "none"
                raise ValueError(
                    f'steps.{number}: input "{step.input}" is not a step before this one ({known})'
                )
            takes_model = step_of(step.kind).takes_model
            if takes_model and not names and not (self.init and step_of(step.kind).trains):
                raise ValueError(
                    f"steps.{number}: a {step.kind} takes a model, and there is none before it; begin with a pretrain"
                    + (", or with init = a finished model" if step_of(step.kind).trains else "")
                )
            names.append(name)

    def check_training(self, config: ModelConfig) -> None:
        """Error: ValueError where a model of this shape cannot be trained as the recipe says."""
        for train in self._trainings():
            _check_training(train, config)

    def architecture(self, vocab_size: int, **token_ids: Any) -> ModelConfig:
        """The model's configuration for a tokenizer of ``vocab_size`` entries. Error: ModelError."""
        return ModelConfig(vocab_size=vocab_size, **self.model.model_dump(), **token_ids)

    def dump(self, folder: Path) -> str:
        """The resolved recipe as TOML for a file in ``folder`` (absent values are left out)."""
        brought = {"tokenizer", "model"} if self.init else set()
        absent = {"steps"} if not self.steps else set()
        tree = self.model_dump(mode="json", exclude_none=True, exclude=brought | absent)
        if self.init:
            tree["init"] = beside(self.init, folder)
        for corpus in _corpora(tree):
            corpus["paths"] = [beside(path, folder) for path in corpus["paths"]]
            if domains.is_file(corpus["kind"]):
                corpus["kind"] = beside(corpus["kind"], folder)
        return tomli_w.dumps(tree)


def _check_training(train: TrainSettings, config: ModelConfig) -> None:
    if train.sequence_length > config.max_position_embeddings:
        raise ValueError(
            f"train.sequence_length {train.sequence_length} is above model.max_position_embeddings {config.max_position_embeddings}"
        )
    if not config.expert_layers:
        return
    if not config.has_selection_bias and train.balance != "none":
        raise ValueError(
            f'train.balance "{train.balance}" moves a selection bias, which softmax gates do not have; set it to "none" and balance by train.sequence_balance (DeepSeek-V2 took 0.003)'
        )
    groups = config.n_group
    if train.balance == "quantile" and config.topk_group < groups:
        raise ValueError(
            f'train.balance "quantile" knows no group limits (model.topk_group {config.topk_group} of {groups}); set it to "centred", or model.topk_group to {groups}'
        )


def _corpora(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """The [corpus] table and those of steps that bring their own, where they are tables."""
    steps = tree.get("steps")
    tables = [tree, *(steps if isinstance(steps, list) else [])]
    found = [table.get("corpus") for table in tables if isinstance(table, dict)]
    return [corpus for corpus in found if isinstance(corpus, dict)]


def load(
    path: Path, changes: list[str] | None = None, run_code: Callable[[Path], object] | None = None
) -> Recipe:
    """Read a recipe file and apply ``section.key=value`` changes; ``run_code`` as `resolve`. Error: RecipeError."""
    path = Path(path)
    return resolve(read(path, changes), path.resolve().parent, str(path), run_code)


def read(path: Path, changes: list[str] | None = None) -> dict[str, Any]:
    """The tables of a recipe file, with the changes. Error: RecipeError, one line."""
    try:
        # A person may give a pipe; in a run folder, which may come from anywhere, a pipe would only hang its reader.
        piped = path.is_fifo() and not domains.is_run(path.parent)
        data = path.read_bytes() if piped else read_regular(path)
        tree = tomllib.loads(data.decode("utf-8-sig"))
    except FileNotFoundError:
        raise RecipeError(
            f"{path} does not exist; give a recipe file such as recipes/poet.toml"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"{path} cannot be read as text ({error}); a recipe is a TOML file"
        ) from None
    except ValueError as error:  # a number of 5,000 digits is one too
        raise RecipeError(f"{path} is not valid TOML: {error}") from None
    except RecursionError:
        raise RecipeError(f"{path} nests too deeply; a recipe has sections and settings") from None
    # A recipe's own paths begin at its folder, those given beside it where the command was given.
    _place(tree, path.resolve().parent)
    for change in changes or []:
        _apply(tree, change)
    _place(tree, Path.cwd())
    return tree


def resolve(
    tree: dict[str, Any],
    base: Path,
    source: str,
    run_code: Callable[[Path], object] | None = None,
) -> Recipe:
    """A recipe from its tables, with relative paths beginning at ``base``. Error: RecipeError naming ``source``.

    ``run_code`` is called with each Python file that a corpus names as its kind, and must load it or refuse; without it
    no such file is touched, and what the recipe says to it is not checked.
    """
    tree = copy.deepcopy(tree)
    _place(tree, base)
    for corpus in _corpora(tree):
        kind = corpus.get("kind")
        if run_code and isinstance(kind, str) and domains.is_file(kind):
            run_code(Path(kind))
    return parse(tree, source)


def _place(tree: dict[str, Any], base: Path) -> None:
    """Make the paths that a recipe names absolute: from the folder ``base``, those with ~ from a home."""

    def placed(path: Any) -> Any:
        if not isinstance(path, str):
            return path
        try:
            return os.path.normpath(base / Path(path).expanduser())
        except RuntimeError:  # the home of nobody: a name like any other
            return os.path.normpath(base / path)

    if "init" in tree:
        tree["init"] = placed(tree["init"])
    for corpus in _corpora(tree):
        if isinstance(corpus.get("paths"), str):  # a list of one
            corpus["paths"] = [corpus["paths"]]
        if isinstance(corpus.get("paths"), list):
            corpus["paths"] = [placed(path) for path in corpus["paths"]]
        if isinstance(corpus.get("kind"), str) and domains.is_file(corpus["kind"]):
            corpus["kind"] = placed(corpus["kind"])


def parse(tree: dict[str, Any], source: str) -> Recipe:
    """Check a parsed recipe. Error: RecipeError naming ``source``, the key and the remedy."""
    try:
        _fill_trainings(tree)
        kind = _class_for(tree)
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{source}: {_explain(error, kind)}") from None


def _fill_trainings(tree: dict[str, Any]) -> None:
    """Give each step that trains in its own way its whole [steps.train]. Error: RecipeError for no such kind.

    [train] is about pretraining, and other steps take from it only what holds for all; in a recipe without pretraining
    it is about all its steps.
    """
    steps, common = tree.get("steps"), tree.get("train", {})
    tables = [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    own = {
        number: step_of(step["kind"]).train_defaults
        for number, step in enumerate(tables)
        if isinstance(step.get("kind"), str)
    }
    if not isinstance(common, dict):
        return
    if any(
        step_of(step["kind"]).trains and own[n] is None for n, step in enumerate(tables) if n in own
    ):
        common = {key: value for key, value in common.items() if key in SHARED}
    for number, defaults in own.items():
        given = tables[number].get("train", {})
        if defaults is not None and isinstance(given, dict):
            tables[number]["train"] = {**defaults, **common, **given}


def _class_for(tree: dict[str, Any]) -> type[Recipe]:
    """The class that checks this recipe: its tables with the settings of their kinds. Error: RecipeError."""
    steps = tree.get("steps")
    tables = isinstance(steps, list) and all(isinstance(step, dict) for step in steps)
    kinds = tuple(map(_step_class, steps)) if steps and tables else None
    return _recipe_class(_corpus_class(tree), kinds)


@cache
def _recipe_class(
    corpus: type[CorpusSettings] | None, steps: tuple[type[StepSettings], ...] | None
) -> type[Recipe]:
    fields: dict[str, Any] = {"corpus": (corpus, ...)} if corpus else {}
    if steps:
        fields["steps"] = (tuple[steps], ...)  # type: ignore[valid-type]  # each in its place
    return create_model("Recipe", __base__=Recipe, **fields)


def _step_class(table: dict[str, Any]) -> type[StepSettings]:
    kind = table.get("kind")
    found = step_of(kind).Settings if isinstance(kind, str) else StepSettings
    return _with_corpus(found, corpus) if (corpus := _corpus_class(table)) else found


@cache
def _with_corpus(step: type[StepSettings], corpus: type[CorpusSettings]) -> type[StepSettings]:
    return create_model(step.__name__, __base__=step, corpus=(corpus, ...))


def _corpus_class(table: dict[str, Any]) -> type[CorpusSettings] | None:
    """By the kind that the table's [corpus] names, without keys that an earlier version wrote for other kinds."""
    corpus = table.get("corpus")
    kind = corpus.get("kind", "text") if isinstance(corpus, dict) else None
    if not isinstance(corpus, dict) or not isinstance(kind, str):
        return None
    found = domains.settings_of(kind)
    if not domains.is_file(kind):
        for name in _OF_SOME_KIND & corpus.keys() - found.model_fields.keys():
            del corpus[name]
    return found


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
        if isinstance(tree.get(section), list):
            raise RecipeError(f"--set {change}: the list {section} is changed in the recipe itself")
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"--set {change}: {section} is a value, not a section")
    tree[name] = value


def _explain(error: ValidationError, kind: type[Recipe]) -> str:
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
        known = _known_keys(kind, where.split(".")[:-1])
        near = difflib.get_close_matches(where.split(".")[-1], known, n=1, cutoff=0.0)
        return (
            f"unknown key {where}; did you mean {near[0]}?{more}"
            if near
            else f"unknown key {where}{more}"
        )
    if fault["type"] == "missing":
        return f"{where} is missing{more}"
    if fault["type"] in ("model_type", "model_attributes_type"):
        return f"{where} is a table: write [{where}], and its settings below{more}"
    if fault["type"] == "tuple_type":
        return f"{where} is a list of tables: write [[{where}]] above each{more}"
    message = fault["msg"].removeprefix("Value error, ")
    if not where:
        return message
    return f"{where}: {message[0].lower()}{message[1:]}, got {fault['input']!r}{more}"


def _known_keys(kind: Any, sections: list[str]) -> list[str]:
    for section in sections:
        parts = [kind, *get_args(kind)]  # of an optional table, of the tuple of steps
        if section.isdecimal():
            kind = parts[1 + int(section)]
            continue
        kind = next((p for p in parts if isinstance(p, type) and issubclass(p, BaseModel)), None)
        field = kind.model_fields.get(section) if kind else None
        if field is None:
            return []
        kind = field.annotation
    parts = [kind, *get_args(kind)]
    found = [p for p in parts if isinstance(p, type) and issubclass(p, BaseModel)]
    return list(found[0].model_fields) if found else []
