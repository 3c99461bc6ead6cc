"""Settings of the corpus stage, as a recipe states them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class CorpusSettings(BaseModel):
    """What to read and how strictly to refine it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["verse", "text"] = Field(
        "text",
        description="verse: regulated Chinese poems asked for by form and title; text: documents",
    )
    paths: list[str] = Field(
        min_length=1,
        description="files, folders or globs (parquet, jsonl, txt), relative to the recipe's folder",
    )
    text_field: str = Field(
        "",
        description="field that holds the text; empty: paragraphs for verse, text for documents",
    )
    id_field: str = Field(
        "id",
        description="field that names a record; records without it are named by file and line",
    )
    simplify: bool = Field(
        True, description="turn traditional Chinese characters into simplified ones"
    )
    min_characters: int = Field(
        40, ge=1, description="documents shorter than this are dropped (kind text)"
    )
    max_characters: int = Field(
        2_000_000, ge=1, description="documents longer than this are dropped (kind text)"
    )
    max_symbol_share: float = Field(
        0.4,
        ge=0,
        le=1,
        description="documents with a larger share of characters that are neither letters, digits "
        "nor spaces are dropped (kind text)",
    )
    max_repeated_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="documents with a larger share of characters in repeated lines are dropped "
        "(kind text)",
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
    formless: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of poems asked for without their form (kind verse)",
    )
    rhymed: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of training poems whose rhyme is asked for too, if they have one (kind verse)",
    )
    title_characters: int = Field(
        16, ge=1, le=64, description="longer titles are cut to this length (kind verse)"
    )

    @property
    def field(self) -> str:
        """The field that holds the text."""
        return self.text_field or ("paragraphs" if self.kind == "verse" else "text")
