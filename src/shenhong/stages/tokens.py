"""tokens: documents rendered, encoded and packed into rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shenhong.stages.base import Context, Stage


class Tokens(Stage):
    follows = ("train.sequence_length", "steps")

    def __init__(self, name: str, output: Path, corpus: Stage, sequence_length: int) -> None:
        super().__init__(name, output, (corpus.name, "tokenizer"))
        self.corpus, self.sequence_length = corpus, sequence_length

    def run(self, context: Context) -> dict[str, Any]:
        from shenhong.corpus.pack import pack
        from shenhong.runs.files import atomic_folder
        from shenhong.stages.init_from import check_prompts
        from shenhong.tokenizer import Tokenizer

        corpus, tokenizer = context.path / self.corpus.output, context.path / "tokenizer"
        check_prompts(corpus, Tokenizer.load(tokenizer))
        with atomic_folder(context.path / self.output) as folder:
            return pack(corpus, tokenizer, folder, self.sequence_length, context.say)
