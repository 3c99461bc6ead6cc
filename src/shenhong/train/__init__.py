"""Training: data order, objective, optimizer, checkpoints, and the loop around them."""

from shenhong.train.loop import train
from shenhong.train.settings import TrainSettings

__all__ = ["TrainSettings", "train"]
