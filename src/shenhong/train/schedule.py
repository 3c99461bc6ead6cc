"""The learning rate over a run: a short linear rise, then linear to zero.

Decaying to zero beats decaying to a tenth by a wide margin at small scale (Bergsma et al. 2025).
"""


def rate(step: int, steps: int, warmup: float) -> float:
    """Factor of the peak rate at ``step`` (0-based) of ``steps``; ``warmup`` is a share of all steps."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return (steps - step) / max(1, steps - rise)
