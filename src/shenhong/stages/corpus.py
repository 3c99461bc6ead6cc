"""corpus: raw text refined into training and held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shenhong.corpus.settings import CorpusSettings
from shenhong.stages.base import Context, Stage


class Corpus(Stage):
    follows = ("corpus", "seed", "steps")

    def __init__(self, name: str, output: Path, settings: CorpusSettings) -> None:
        super().__init__(name, output)
        self.settings = settings

    def run(self, context: Context) -> dict[str, Any]:
        from shenhong import domains
        from shenhong.corpus import sources
        from shenhong.corpus.refine import refine
        from shenhong.runs.files import atomic_folder, digest

        # Before they are read: a file that changes meanwhile then shows when the run goes on.
        recorded = sources.record(self.settings, context.path)
        domain = domains.domain(self.settings.kind)
        with atomic_folder(context.path / self.output) as folder:
            seed, say = context.recipe.seed, context.say
            report = refine(self.settings, domain, Path("."), folder, seed, say)
        return {
            "kept": report.get("kept"),
            **recorded,
            "train_sha256": digest(context.path / self.output / "train.parquet"),
        }
