"""How a model is sampled where a caller says nothing: fields of generation_config.json under GGUF's names.

llama.cpp reads general.sampling.* of a file since 2025. Greedy is do_sample = false there, and temperature 0 here.
"""

from __future__ import annotations

import math
from typing import Any

import gguf
import numpy as np

from shenhong.export.gguf_file import GgufFile

_NAMES = {
    "temperature": gguf.Keys.General.SAMPLING_TEMP,
    "top_k": gguf.Keys.General.SAMPLING_TOP_K,
    "top_p": gguf.Keys.General.SAMPLING_TOP_P,
    "min_p": gguf.Keys.General.SAMPLING_MIN_P,
    "repetition_penalty": gguf.Keys.General.SAMPLING_PENALTY_REPEAT,
}


def add_sampling(writer: gguf.GGUFWriter, said: dict[str, Any]) -> None:
    """Writes what generation_config.json says; a value that is no number of its kind is left out."""
    given = dict(said, temperature=0.0) if said.get("do_sample") is False else said
    for name, key in _NAMES.items():
        value = given.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if name == "top_k" and isinstance(value, int) and 0 <= value < 2**31:
            writer.add_int32(key, value)
        elif name != "top_k" and math.isfinite(value):
            writer.add_float32(key, float(value))


def sampling_of(file: GgufFile) -> dict[str, Any]:
    """The same as generation_config.json would say it."""
    said: dict[str, Any] = {}
    for name, key in _NAMES.items():
        value = file.metadata.get(key)
        if isinstance(value, float):
            value = float(str(np.float32(value)))  # 0.6, not 0.6000000238418579
        if value is not None:
            said[name] = value
    if (temperature := said.get("temperature")) is None:
        return said
    if temperature == 0:
        del said["temperature"]
    return {"do_sample": temperature != 0, **said}
