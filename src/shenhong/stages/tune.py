"""tune: learn from conversations to answer as the assistant in them does.

Conversations are written as the model's own template writes them, and only what the assistant says is learnt. It goes on
from the model of the step before, or from the recipe's ``init``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from shenhong.errors import RecipeError
from shenhong.recipe import Recipe
from shenhong.stages.base import Context, Stage
from shenhong.stages.corpus import Corpus
from shenhong.stages.training import Training


class Tune(Training):
    train_defaults: ClassVar[
        Mapping[str, Any] | None
    ] = {  # for a model that knows its language and has it to lose
        "batch_tokens": 4096,
        "sequence_length": 1024,
        "optimizer": "adamw",
        "lr": 1e-4,
        "vector_lr": 1e-4,
        "weight_decay": 0.0,
        "warmup": 0.1,
        "epochs": 3.0,
    }

    def data(self) -> list[Stage]:
        own = self.settings.corpus is not None
        name = self.named("corpus") if own else "corpus"
        corpus = Corpus(name, self.corpus_folder, self.corpus)
        return [*([corpus] if own else []), Chats(self, corpus)]


class Chats(Stage):
    """Conversations rendered, encoded and packed into rows."""

    follows = ("train.sequence_length", "steps")

    def __init__(self, step: Tune, corpus: Corpus) -> None:
        super().__init__(step.named("tokens"), step.folder / "tokens", (corpus.name, "tokenizer"))
        self.step, self.corpus = step, corpus

    def check(self, recipe: Recipe) -> None:
        if not self.step.corpus.conversations:
            raise RecipeError(
                f'the step {self.step.name} learns from conversations: set corpus.kind = "chat", or give it a [steps.corpus] of its own'
            )

    def run(self, context: Context) -> dict[str, Any]:
        from shenhong.chat.pack import pack
        from shenhong.runs.files import atomic_folder

        corpus: Path = context.path / self.corpus.output
        allowed, width = self.step.corpus.max_unreadable, self.step.train.sequence_length
        with atomic_folder(context.path / self.output) as folder:
            return pack(corpus, context.path / "tokenizer", folder, width, allowed, context.say)


STEP = Tune
