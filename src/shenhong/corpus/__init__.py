"""From raw records to packed rows of tokens.

Offers `corpus.settings.CorpusSettings`, `corpus.refine.refine` (the corpus stage), `corpus.pack.pack`
(the packing) and `corpus.sources` (whether the raw files changed); `corpus.formats` holds one module a
kind of file. They are imported from their modules, so that reading a recipe does not load the dataframe
engine.
"""
