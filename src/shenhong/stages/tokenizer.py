"""tokenizer: the vocabulary, learnt from the run's corpus or taken over from the model that training begins with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shenhong.stages.base import Context, Stage

if TYPE_CHECKING:
    from shenhong.recipe import Recipe


class Tokenizer(Stage):
    follows = ("tokenizer", "init", "corpus.simplify")

    def __init__(self) -> None:
        super().__init__("tokenizer", Path("tokenizer"), ("corpus",))

    def check(self, recipe: Recipe) -> None:
        from shenhong.stages.init_from import looked_at

        if recipe.init:
            looked_at(recipe)

    def run(self, context: Context) -> dict[str, Any]:
        from shenhong.runs.files import atomic_folder
        from shenhong.stages.init_from import take_over
        from shenhong.tokenizer.tokenizer import build

        recipe = context.recipe
        with atomic_folder(context.path / self.output) as folder:
            if recipe.init:
                return take_over(recipe, folder)
            corpus, simplify = context.path / "corpus", recipe.corpus.simplify
            return build(corpus, folder, recipe.tokenizer, context.say, simplify)
