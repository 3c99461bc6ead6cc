"""A finished model folder written again in another precision, as the same kind of folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shenhong.errors import ModelError, UsageError
from shenhong.export.gguf import Written
from shenhong.export.huggingface import Precision, load_model, read_shape, save_model
from shenhong.export.verdicts import TRANSFORMERS, verdict

PRECISIONS: dict[int, Precision] = {32: "float32", 16: "bfloat16", 8: "float8"}


def save_folder(folder: str | Path, out: str | Path, bits: int = 16) -> Written:
    """Writes ``folder`` as the Hugging Face folder ``out`` with ``bits`` a number, whole or not at all.

    An ``out`` that is another model is replaced; anything else under that name is left alone. Errors: UsageError,
    ModelError where the model does not load or transformers would not open it, RunError when the folder cannot be written.
    """
    folder, out = Path(folder), Path(out)
    precision = PRECISIONS.get(bits)
    if precision is None:
        raise UsageError(f"--bits {bits} goes with --to gguf; for --to hf choose 32, 16 or 8")
    if folder.resolve() == out.resolve() or folder.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"--out {out} is where the model lies; choose another folder")
    if out.exists() and not (out / "config.json").is_file():
        raise UsageError(f"--out {out} exists and is no model folder; choose another name")
    judged = verdict(TRANSFORMERS, read_shape(folder))
    if not judged.opens:
        raise ModelError(
            f"{folder} cannot be exported: {TRANSFORMERS}: {'; '.join(judged.reasons)}"
        )
    save_model(load_model(folder), out, folder, dtype=precision, generation=_generation(folder))
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    tensors = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    return Written(out, sum(sizes.values()), {precision: tensors}, [])


def _generation(folder: Path) -> dict[str, Any]:
    """What generation_config.json says of sampling; absent where there is none."""
    path = folder / "generation_config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON ({error}); copy the model folder again") from None
    return values if isinstance(values, dict) else {}
