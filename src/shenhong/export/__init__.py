"""Finished models as files other engines open."""

from shenhong.export.convert import save_folder
from shenhong.export.gguf import save_gguf
from shenhong.export.gguf_file import open_gguf
from shenhong.export.huggingface import load_model, save_model

__all__ = ["load_model", "open_gguf", "save_folder", "save_gguf", "save_model"]
