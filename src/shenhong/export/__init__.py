"""Finished models as files other engines open."""

from shenhong.export.huggingface import load_model, save_model

__all__ = ["load_model", "save_model"]
