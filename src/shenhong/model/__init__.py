"""The decoder: its shape, its parts, and what they cost."""

from shenhong.model.balance import RouterStats, sum_stats
from shenhong.model.config import ModelConfig, Yarn
from shenhong.model.decode import PreparedDecoder
from shenhong.model.decoder import Decoder, Hidden
from shenhong.model.experts import Observe

__all__ = [
    "Decoder",
    "Hidden",
    "ModelConfig",
    "Observe",
    "PreparedDecoder",
    "RouterStats",
    "Yarn",
    "sum_stats",
]
