"""What the numbers of a run mean, a sentence each, for people who do not read tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

Json = Mapping[str, Any]
_MOST_OF_IT = 0.9  # of a text


def continued(validations: Sequence[Json]) -> str | None:
    """Whether training made a finished model better: the look before its first step beside the best one after it."""
    looks = [v for v in validations if _number(v.get("nats_per_token"))]
    if len(looks) < 2 or looks[0].get("step") != 0:
        return None
    before, *after = (v["nats_per_token"] / math.log(2) for v in looks)
    best = min(after)
    numbers = (
        f"held-out text cost {before:.3f} bits per token before training and {best:.3f} after it"
    )
    if best < before:
        return f"{numbers}: {1 - best / before:.1%} less"
    return (
        f"{numbers}: training made nothing better; more text, a lower train.lr or fewer steps might"
    )


def beside_ngram(model: float, rival: Json, plan: Json) -> str | None:
    """Why a table of counts foretells held-out text better than the model, where it does."""
    counts = (rival.get("bits_per_character") or {}).get("value")
    if not _number(counts) or not _number(model) or model <= counts:
        return None
    what = f"a {rival.get('order')}-gram of the same text foretells it better ({counts:.3f} bits per character, the model {model:.3f})"
    epochs = plan.get("epochs")
    if plan.get("steps_that_fit"):
        return f"{what}: there is too little text to learn a language from nothing; go on from a pretrained model instead (recipes/continue.toml)"
    if _number(epochs) and epochs < _MOST_OF_IT:
        return f"{what}: the model has read only {epochs:.0%} of the text; give it more minutes"
    return f"{what}: the model has seen too few steps; give it more minutes, or go on from a pretrained model (recipes/continue.toml)"


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)
