"""Settings of the training loop: names, units, bounds and defaults."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

# What is of the machine and the model, whatever is learnt: steps of all kinds take these from the recipe's [train].
SHARED = (
    *("micro_tokens", "sequence_length", "dtype", "threads", "kernels"),
    *("checkpoint_seconds", "valid_every", "valid_tokens", "valid_rows"),
)


class TrainSettings(BaseModel):
    """One training loop. Tokens are counted as the model sees them, prompts included."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: int | None = Field(
        None, ge=1, description="optimizer steps; absent: what fits into the recipe's minutes"
    )
    batch_tokens: int = Field(
        8192, ge=16, description="tokens of one optimizer step, over all processes"
    )
    micro_tokens: int = Field(
        8192, ge=16, description="tokens of one forward pass of one process; more are accumulated"
    )
    sequence_length: int = Field(
        512, ge=16, description="tokens of one row; documents are packed whole into rows"
    )
    prompt_weight: float = Field(
        0.0, ge=0, le=1, description="weight of prompt tokens in the loss (answers weigh 1)"
    )
    optimizer: Literal["muon", "adamw"] = Field("muon", description="of the matrices")
    lr: float = Field(
        0.02,
        gt=0,
        lt=1,
        description="peak rate of matrices; Muon's update is scaled to AdamW's size (Moonlight, eq. 4)",
    )
    vector_lr: float = Field(
        0.004,
        gt=0,
        lt=1,
        description="peak rate of norms, routers, embedding and head (always AdamW)",
    )
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's Nesterov momentum")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the mean gradient")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's decay of the mean square")
    weight_decay: float = Field(0.1, ge=0, description="decoupled, on matrices only")
    clip: float = Field(1.0, gt=0, description="largest norm of the whole gradient")
    warmup: float = Field(
        0.03, ge=0, lt=1, description="share of steps with rising rate; afterwards linear to zero"
    )
    balance: Literal["quantile", "centred", "sign", "none"] = Field(
        "quantile",
        description="rule for the routers' selection bias; quantile: without group limits",
    )
    balance_rate: float = Field(
        0.001, ge=0, description="step of the bias; the quantile rule needs none"
    )
    sequence_balance: float = Field(
        1e-4, ge=0, description="weight of the sequence-wise balance loss (V3, eq. 17)"
    )
    mtp_weight: float = Field(
        0.3, ge=0, description="weight of the second-next-token loss (V3, eq. 25)"
    )
    mtp_start: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of steps before multi-token prediction trains; above 0 it leaves the trunk alone",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of matrix products; weights and optimizer stay float32"
    )
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="of each process; auto: all cores"
    )
    kernels: bool | Literal["auto"] = Field(
        "auto", description="fused CPU kernels, where they compile and match"
    )
    checkpoint_seconds: float = Field(60.0, gt=0, description="time between checkpoints")
    valid_every: float = Field(
        0.1,
        gt=0,
        le=1,
        description="share of steps between validations on held-out text; a planned training takes fewer where they are dear",
    )
    valid_tokens: int = Field(
        20_000,
        ge=16,
        description="tokens of held-out text in a validation, where there are as many",
    )
    valid_rows: int | None = Field(
        None, ge=1, description="rows of held-out text in a validation; absent: by valid_tokens"
    )
    epochs: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="how often a planned training may read the text; auto: as long as it helps",
    )
    spike: float = Field(
        2.0, gt=0, description="nats per token above the running mean that stop the run"
    )

    @property
    def rows_a_step(self) -> int:
        return self.batch_tokens // self.sequence_length
