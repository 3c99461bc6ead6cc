"""corpus: raw text refined into training and held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shenhong.corpus.settings import CorpusSettings
from shenhong.errors import DataError
from shenhong.stages.base import Context, Stage

if TYPE_CHECKING:
    from shenhong.recipe import Recipe


class Corpus(Stage):
    follows = ("corpus", "seed", "steps")

    def __init__(self, name: str, output: Path, settings: CorpusSettings) -> None:
        super().__init__(name, output)
        self.settings = settings

    def run(self, context: Context) -> dict[str, Any]:
        from shenhong import domains
        from shenhong.corpus import sources
        from shenhong.corpus.refine import TooLittleError, refine
        from shenhong.runs.files import atomic_folder, digest

        # Before they are read: a file that changes meanwhile then shows when the run goes on.
        recorded = sources.record(self.settings, context.path)
        domain = domains.domain(self.settings.kind)
        with atomic_folder(context.path / self.output) as folder:
            seed, say = context.recipe.seed, context.say
            try:
                report = refine(self.settings, domain, Path("."), folder, seed, say)
            except TooLittleError as error:
                faults = [str(error), *_next_faults(folder, context.recipe)]
                raise TooLittleError("; ".join(faults)) from None
        return {
            "kept": report.get("kept"),
            **recorded,
            "train_sha256": digest(context.path / self.output / "train.parquet"),
        }


def _next_faults(folder: Path, recipe: Recipe) -> list[str]:
    """What the tokenizer would say of so little text, so that a person hears of it at once."""
    import pyarrow.parquet as pq

    from shenhong.tokenizer import tokenizer

    if recipe.init:
        return []
    try:
        texts = pq.read_table(folder / "train.parquet", columns=["text"])["text"].to_pylist()
        tokenizer.train(texts, recipe.tokenizer)
    except DataError as error:
        return [str(error)]
    return []
