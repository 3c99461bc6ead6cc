"""How a model is sampled where a caller sets nothing: as its generation_config.json or its GGUF file says, else by our own
defaults."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from shenhong.engine import Sampling
from shenhong.export import open_gguf
from shenhong.export.gguf_sampling import sampling_of
from shenhong.models import is_gguf
from shenhong.runs.regular import read_inside
from shenhong.serve.http.fields import SamplingFields

log = logging.getLogger("shenhong")

NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def defaults_of(model: Path) -> Sampling:
    """Of a folder or a GGUF file. A file that cannot be honoured is one warning, and is not used."""
    path = model if is_gguf(model) else model / "generation_config.json"
    try:
        found = sampling_of(open_gguf(path)) if is_gguf(path) else json.loads(read_inside(path))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        given = {name: found[name] for name in NAMES if found.get(name) is not None}
        if found.get("do_sample") is False:
            given["temperature"] = 0
        checked = SamplingFields.model_validate(given, strict=True).model_dump(include=set(given))
        return Sampling(**checked)
    except (FileNotFoundError, NotADirectoryError):
        return Sampling()
    except ValidationError as error:
        wrong = error.errors()[0]
        why = f"{wrong['loc'][0]}: {wrong['msg']}"
    except (OSError, ValueError, RecursionError) as error:
        why = f"it cannot be read ({error})"
    log.warning("%s: %s; the model is sampled as if the file said nothing of it", path, why)
    return Sampling()


def sampling_json(sampling: Sampling) -> dict[str, Any]:
    """For callers."""
    return {name: value for name, value in asdict(sampling).items() if name != "logit_bias"}
