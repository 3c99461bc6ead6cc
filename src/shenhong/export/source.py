"""A finished model on disk, whichever of two kinds it is: a Hugging Face folder or a GGUF file."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from shenhong.export import shards
from shenhong.export.gguf_file import open_gguf
from shenhong.export.gguf_model import check_gguf, gguf_config, load_gguf
from shenhong.export.gguf_sampling import sampling_of
from shenhong.export.gguf_tokenizer import gguf_tokenizer
from shenhong.export.huggingface import (
    GENERATION,
    check_model,
    generation,
    load_model,
    tokenizer_files,
)
from shenhong.model import Decoder, ModelConfig
from shenhong.model.hf_config import read_config
from shenhong.tokenizer import Tokenizer


def is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


class Source(NamedTuple):
    """What was read of a model: all but its weights."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer

    def check(self) -> ModelConfig:
        """The shape the decoder will have. Error: ModelError where one of the tensors does not fit it."""
        return check_gguf(open_gguf(self.path)) if is_gguf(self.path) else check_model(self.path)[0]

    def decoder(self) -> Decoder:
        return load_gguf(self.path) if is_gguf(self.path) else load_model(self.path)

    def weights(self) -> list[Path]:
        """The files that hold them."""
        return [self.path] if is_gguf(self.path) else shards.tensor_files(self.path)

    def generation(self, config: ModelConfig) -> dict[str, Any]:
        """How an answer ends and is sampled, as generation_config.json says it. Error: ModelError."""
        if not is_gguf(self.path):
            return generation(config, self.path)
        ends = sorted(self.tokenizer.ends)
        said = generation(config, None) | ({"eos_token_id": ends} if len(ends) > 1 else {})
        return said | sampling_of(open_gguf(self.path))

    def write_tokenizer(self, folder: Path) -> None:
        """The tokenizer, and how the model is asked, ends and is sampled, as files of a folder."""
        if is_gguf(self.path):
            self.tokenizer.save(folder)
        else:
            for name, content in tokenizer_files(self.path).items():
                (folder / name).write_bytes(content)
        said = json.dumps(self.generation(self.config), indent=2) + "\n"
        (folder / GENERATION).write_text(said, encoding="utf-8")

    @contextlib.contextmanager
    def tokenizer_folder(self) -> Iterator[Path]:
        """A folder with these files, for as long as it is needed."""
        if not is_gguf(self.path):
            yield self.path
            return
        with tempfile.TemporaryDirectory() as made:
            self.write_tokenizer(Path(made))
            yield Path(made)


def open_source(path: Path) -> Source:
    """Of a model folder or a GGUF file. Error: ModelError."""
    if is_gguf(path):
        file = open_gguf(path)
        return Source(path, gguf_config(file), gguf_tokenizer(file))
    return Source(path, read_config(path / "config.json"), Tokenizer.load(path))
