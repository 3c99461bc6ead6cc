"""Settings of the corpus stage that every kind of text shares; a domain adds its own to the same table."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field


class CorpusSettings(BaseModel):
    """What to read and how strictly to refine it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    default_field: ClassVar[str] = "text"  # holds the text where the recipe names no field
    conversations: ClassVar[bool] = False  # whether records are conversations, and not texts

    kind: str = Field(
        "text",
        description="the kind of text: a domain, or a Python file of your own (docs/extending.md)",
    )
    paths: list[str] = Field(
        min_length=1,
        description="files, folders or globs, relative to the recipe's folder, or from ~: text (.txt, .md, .rst), .jsonl, "
        ".json, .parquet; all but parquet also as .gz, .zst, .bz2, .xz. A text is cut into documents: at the first blank "
        "line after 2,000 characters, else at a line end after 8,000, else at a sentence's end or a space before 16,000",
    )
    text_field: str = Field(
        "",
        description="field that holds the text, as in body or translation.en; empty: the domain's own, text for documents",
    )
    id_field: str = Field(
        "id",
        description="field that names a record; records without it, and all where two have the same, are named by their file, below what paths names, and its line",
    )
    max_unreadable: float = Field(
        0.05,
        ge=0,
        le=1,
        description="share of records that may be skipped because they cannot be read: no JSON, no UTF-8, no text; and of the files in folders that may be damaged, which are read up to there",
    )
    simplify: bool = Field(
        False, description="turn traditional Chinese characters into simplified ones"
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
    held_out: float | None = Field(
        None,
        gt=0,
        le=0.4,
        description="share of records held out for validation, and again as many for the test; absent: 0.01, of a small "
        "corpus up to 0.05, in pieces of documents where they are few",
    )

    @property
    def field(self) -> str:
        """The field that holds the text."""
        return self.text_field or self.default_field
