"""A step that trains: its data is packed, it learns, and its finished folder is written.

A kind of training step subclasses `Training` and says what is learnt from what (`learning`), what the data is made of
(`data`), and where its training differs from [train]'s defaults (`train_defaults`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from shenhong.stages.base import Context, Stage, Step, StepSettings
from shenhong.stages.corpus import Corpus
from shenhong.stages.publish import Publish, architecture
from shenhong.stages.tokens import Tokens
from shenhong.train.settings import TrainSettings

if TYPE_CHECKING:
    from torch import Tensor

    from shenhong.model import Decoder, ModelConfig
    from shenhong.runs.run import Run
    from shenhong.tokenizer import Tokenizer
    from shenhong.train.data import Source
    from shenhong.train.objectives import Objective
    from shenhong.train.validate import Validate

SAMPLES, SAMPLE_TOKENS = 4, 80  # written at every look at held-out text


class TrainingSettings(StepSettings):
    train: TrainSettings | None = Field(
        None,
        description="of a pretrain, absent: the recipe's [train]; other steps have defaults of their own",
    )
    share: float = Field(
        1.0, gt=0, description="of the minutes left for training, beside the shares of other steps"
    )


class Learning(NamedTuple):
    """What a step minimises, where its batches come from, and how the model is looked at.

    None, None, None: the next token of the rows in the step's folder tokens/.
    """

    objective: Objective | None = None
    source: Source | None = None
    validate: Validate | None = None


class Training(Step):
    Settings = TrainingSettings
    trains = True

    @property
    def train(self) -> TrainSettings:
        return self.settings.train or self.recipe.train

    @property
    def measured_on(self) -> Step:
        return self

    def named(self, stage: str) -> str:
        """A stage's name: its own in the only step of a run, with the step's before it in a list."""
        return stage if self.folder == Path(".") else f"{self.name}/{stage}"

    @property
    def corpus_folder(self) -> Path:
        return self.folder / "corpus" if self.settings.corpus else Path("corpus")

    def learning(self, context: Context, config: ModelConfig) -> Learning:
        """Asked once in every process, when the weights that training begins with are known to be there."""
        return Learning()

    def data(self) -> list[Stage]:
        """The stages that make what is learnt from; the last one is what training reads."""
        own = self.settings.corpus is not None
        name = self.named("corpus") if own else "corpus"
        corpus = Corpus(name, self.corpus_folder, self.corpus)
        length = self.train.sequence_length
        tokens = Tokens(self.named("tokens"), self.folder / "tokens", corpus, length)
        return [*([corpus] if own else []), tokens]

    def stages(self) -> list[Stage]:
        data = self.data()
        train = Train(self, data[-1])
        return [*data, train, Publish(self.named("model"), self.model, train)]


class Train(Stage):
    parallel = trains = True
    follows = ("train", "model", "init", "seed", "minutes", "reserve_seconds", "steps")

    def __init__(self, step: Training, data: Stage) -> None:
        reads = (data.name, *((step.before.made_by,) if step.before else ()))
        super().__init__(step.named("train"), step.folder / "checkpoints", reads)
        self.step = step

    def begun(self, run: Run) -> bool:
        from shenhong.train import checkpoint

        return super().begun(run) or bool(checkpoint.saved(run.path / self.output))

    def present(self, run: Run) -> bool:
        """Checkpoints are needed until the finished model is there."""
        from shenhong.train import checkpoint

        if (run.path / self.step.model).exists():
            return True
        outputs = run.manifest["stages"][self.name].get("outputs", {})
        last = outputs.get("last_step", run.manifest[self.name]["steps"])
        return checkpoint.folder_of(run.path / self.output, last).exists()

    def run(self, context: Context) -> dict[str, Any]:
        from shenhong.train import checkpoint, train

        recipe = context.recipe
        started = time.monotonic()
        spent = _seconds_spent(context.run.manifest) if context.run else 0.0

        def seconds_left(seconds_a_token: float) -> float:
            """Asked when the steps are counted, so that the trials are paid for too."""
            reserve = recipe.reserve_seconds
            if reserve is None:
                reserve = self._seconds_after(context, seconds_a_token)
            used = spent + reserve + time.monotonic() - started
            left = (recipe.minutes or 0) * 60 - used
            return max(1.0, left * self._share(context.run))

        config = architecture(context)
        train(
            context.run,
            context.path / self.step.folder,
            self.step.train,
            config,
            recipe.seed,
            context.mesh,
            seconds_left,
            self._sampler(context),
            (lambda: self._first(context)) if self._continues(context) else None,
            self.name,
            *self.step.learning(context, config),
        )
        if not context.mesh.leads:
            return {}
        # Training may have ended before its last planned step.
        return {"last_step": checkpoint.last_step(context.path / self.output)}

    def _seconds_after(self, context: Context, seconds_a_token: float) -> float:
        """How long it will take to publish and measure what has been trained."""
        from shenhong import LONGEST_ANSWER
        from shenhong.evaluate import cost
        from shenhong.evaluate.evaluate import read_split

        assert context.run is not None
        settings, domain = context.recipe.evaluate, self.step.domain
        corpus, stages = context.path / self.step.corpus_folder, context.run.manifest["stages"]
        packed = stages[self.step.named("tokens")]["outputs"]
        held_out = read_split(corpus, "test", ("id", "prompt", "text", *domain.columns))
        answers = 0.0
        if settings.titles:
            references = domain.questions(held_out, settings, context.recipe.seed).references
            a_character = packed["test"]["counted"] / max(1, packed["test"]["characters"])
            lengths = [min(LONGEST_ANSWER, len(text) * a_character) for text in references]
            # Few texts at once take longer a token than many.
            answers = sum(lengths) * seconds_a_token * (3 if len(references) >= 16 else 6)
        return cost.seconds(
            settings,
            held_out["text"],
            packed["train"]["characters"],
            packed["test"]["tokens"],
            seconds_a_token,
            answers,
        )

    def _continues(self, context: Context) -> bool:
        """Whether training begins with a model and not with random weights."""
        return self.step.before is not None or bool(context.recipe.init)

    def _share(self, run: Run | None) -> float:
        """This step's part of the time that is left for training, beside the steps that have not trained yet."""
        from shenhong.stages.plan import steps

        assert run is not None
        rest = [
            step.settings.share
            for step in steps(self.step.recipe)
            if isinstance(step, Training)
            and step.train.steps is None
            and not run.done(step.named("train"))
        ]
        return self.step.settings.share / sum(rest)

    def _first(self, context: Context) -> dict[str, Tensor]:
        """The weights training begins with."""
        from shenhong.export import load_model
        from shenhong.stages.init_from import weights

        if self.step.before is not None:
            return load_model(context.path / self.step.before.model).state_dict()
        stage = json.loads((context.path / "manifest.json").read_text())["stages"]["tokenizer"]
        return weights(context.recipe, stage["outputs"]["init_sha256"])

    def _sampler(self, context: Context) -> Callable[[Decoder], list[tuple[str, str]]]:
        """What the model writes of some held-out prompts, always the same, for those who watch it learn."""
        import pyarrow.parquet

        from shenhong.engine import Engine
        from shenhong.errors import RequestError
        from shenhong.tokenizer import Tokenizer

        valid = pyarrow.parquet.read_table(
            context.path / self.step.corpus_folder / "valid.parquet",
            columns=["prompt", "text", *self.step.domain.columns],
        ).slice(0, SAMPLES)
        tokenizer = Tokenizer.load(context.path / "tokenizer")
        if self.step.corpus.conversations:
            prompts, ids = self._conversations(context, valid.to_pydict(), tokenizer)
        else:
            prompts = valid["prompt"].to_pylist()
            ids = [tokenizer.encode_prompt(p) if p else [tokenizer.bos_id] for p in prompts]

        def write(model: Decoder) -> list[tuple[str, str]]:
            try:
                done = Engine(model).generate(ids, SAMPLE_TOKENS, seed=context.recipe.seed)
            except RequestError:  # a weight is not a number: training itself says so, and where
                return []
            texts = [tokenizer.decode(completion.tokens) for completion in done]
            return list(zip(prompts, texts, strict=True))

        return write

    def _conversations(
        self, context: Context, valid: dict[str, list[str]], tokenizer: Tokenizer
    ) -> tuple[list[str], list[list[int]]]:
        """What is asked in held-out conversations, as a person reads it and as the model does."""
        from shenhong.chat.template import SECONDS, Template

        domain, settings = self.step.domain, context.recipe.evaluate
        asked = domain.questions(valid, settings, context.recipe.seed).prompts
        talks: Any = [domain.asked(prompt) for prompt in asked]
        with Template(context.path / "tokenizer", tokenizer, SECONDS) as template:
            ids = [template.prompt_now(talk) for talk in talks]
        return [talk[-1]["content"] for talk in talks], ids


def _seconds_spent(manifest: dict[str, Any]) -> float:
    return sum(stage.get("seconds", 0.0) for stage in manifest["stages"].values())
