"""What `evaluate` measures with; the recipe's [evaluate] table."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class EvaluateSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    titles: int = Field(
        400, ge=0, le=100_000, description="held-out prompts to answer; 0 skips generation"
    )
    temperature: float = Field(0.8, ge=0.0, le=5.0, description="of plain sampling; 0 is greedy")
    samples: int = Field(8, ge=0, le=1000, description="answers shown in the report")
    ngram_order: int = Field(
        5, ge=1, le=8, description="characters of the Kneser-Ney n-gram beside the model"
    )
    ngram_characters: int = Field(
        10_000_000,
        ge=1000,
        description="of training text that the n-gram learns; of more, texts in even distances",
    )
