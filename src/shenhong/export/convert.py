"""A finished model, folder or GGUF file, written as a folder in one of three precisions."""

from __future__ import annotations

from pathlib import Path

from shenhong.errors import ModelError, UsageError
from shenhong.export.gguf import Written
from shenhong.export.huggingface import Precision, save_model
from shenhong.export.source import open_source
from shenhong.export.verdicts import TRANSFORMERS, verdict

PRECISIONS: dict[int, Precision] = {32: "float32", 16: "bfloat16", 8: "float8"}


def save_folder(model: str | Path, out: str | Path, bits: int = 16) -> Written:
    """Writes a model folder or GGUF file as the Hugging Face folder ``out`` with ``bits`` a number, whole or not at all.

    An ``out`` that is another model is replaced; anything else under that name is left alone. Errors: UsageError,
    ModelError where the model does not load or transformers would not open it, RunError when the folder cannot be written.
    """
    model, out = Path(model), Path(out)
    precision = PRECISIONS.get(bits)
    if precision is None:
        raise UsageError(f"--bits {bits} goes with --to gguf; for --to hf choose 32, 16 or 8")
    if model.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"--out {out} is where the model lies; choose another folder")
    if out.exists() and not (out / "config.json").is_file():
        raise UsageError(f"--out {out} exists and is no model folder; choose another name")
    source = open_source(model)
    judged = verdict(TRANSFORMERS, source.check())
    if not judged.opens:
        raise ModelError(f"{model} cannot be exported: {TRANSFORMERS}: {'; '.join(judged.reasons)}")
    with source.tokenizer_folder() as tokenizer:
        save_model(source.decoder(), out, tokenizer, dtype=precision)
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    tensors = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    return Written(out, sum(sizes.values()), {precision: tensors}, [])
