"""Text to token ids and back, and one spelling for one text before that.

tokenizer.Tokenizer    ours or one that came with a model
normalise, variants    Unicode form, white space, variant glyphs, simplified characters
"""

from shenhong.tokenizer.tokenizer import Tokenizer, TokenizerSettings

__all__ = ["Tokenizer", "TokenizerSettings"]
