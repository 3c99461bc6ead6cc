"""Generation from a finished or a half-trained model."""

from shenhong.engine.engine import Completion, Engine, EngineSettings
from shenhong.engine.request import (
    Constraint,
    EngineStats,
    Event,
    Request,
    Sampling,
    TokenLogprob,
    Usage,
)
from shenhong.engine.sampler import request_seed
from shenhong.engine.speculate import DraftReport

__all__ = [
    "Completion",
    "Constraint",
    "DraftReport",
    "Engine",
    "EngineSettings",
    "EngineStats",
    "Event",
    "Request",
    "Sampling",
    "TokenLogprob",
    "Usage",
    "request_seed",
]
