"""Regulated Chinese verse: poems of a form, a title and a rhyme.

corpus     clean poems out of raw ones, their titles     prosody   the rules of form, rhyme and tone
prompts    how a poem is asked for                       measures  how well a model keeps the rules
report     its sections of a run's report                page      an answer set as verse
"""

from shenhong.domains.verse.domain import DOMAIN

__all__ = ["DOMAIN"]
