"""The command line: `shenhong VERB`, also as `python -m shenhong.cli`."""

from shenhong.cli.main import main

__all__ = ["main"]
