"""Shenhong (深红): text in, a language model people can talk to out, on the hardware at hand."""

__version__ = "0.1.0"

LONGEST_ANSWER = 256  # tokens, where nobody says otherwise
