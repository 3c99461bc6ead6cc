"""Shenhong (深红): text in, a language model people can talk to out, on the hardware at hand.

from shenhong import LLM, Sampling, train_recipe
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shenhong.engine import Sampling
    from shenhong.llm import LLM, Score
    from shenhong.pipeline import train_recipe

__version__ = "0.2.0"
__all__ = ["LLM", "Sampling", "Score", "train_recipe"]

LONGEST_ANSWER = 256  # tokens, where nobody says otherwise

# Loaded when they are asked for: torch alone takes seconds.
_HOMES = {
    "LLM": "shenhong.llm",
    "Score": "shenhong.llm",
    "Sampling": "shenhong.engine",
    "train_recipe": "shenhong.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
