"""Generation from a finished or a half-trained model."""

from shenhong.engine.engine import Completion, Engine
from shenhong.engine.sampler import Sampling, request_seed

__all__ = ["Completion", "Engine", "Sampling", "request_seed"]
