"""Settings of the corpus stage that every kind of text shares; a domain adds its own to the same table."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field


class CorpusSettings(BaseModel):
    """What to read and how strictly to refine it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    default_field: ClassVar[str] = "text"  # holds the text where the recipe names no field

    kind: str = Field(
        "text",
        description="the kind of text: a domain, or a Python file of your own (docs/extending.md)",
    )
    paths: list[str] = Field(
        min_length=1,
        description="files, folders or globs (parquet, jsonl, txt), relative to the recipe's folder",
    )
    text_field: str = Field(
        "", description="field that holds the text; empty: the domain's own, text for documents"
    )
    id_field: str = Field(
        "id",
        description="field that names a record; records without it are named by file and line",
    )
    simplify: bool = Field(
        True, description="turn traditional Chinese characters into simplified ones"
    )
    near_duplicate: float = Field(
        0.6,
        ge=0.3,
        le=1,
        description="Jaccard similarity of shingles from which the later of two records is dropped; "
        "1: only exact duplicates are",
    )
    leak_overlap: float = Field(
        0.4,
        gt=0,
        le=1,
        description="a training record is dropped when it shares this part of the shingles of the "
        "shorter of itself and a held-out record",
    )
    held_out: float = Field(
        0.01,
        gt=0,
        le=0.4,
        description="share of records held out for validation, and again as many for the test",
    )

    @property
    def field(self) -> str:
        """The field that holds the text."""
        return self.text_field or self.default_field
