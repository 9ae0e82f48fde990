"""The learning-rate schedule, as a pure function of the step: it has no state to save, and is easy to plot."""

from __future__ import annotations

from math import ceil, cos, pi


def warmup_steps(num_steps: int, share: float) -> int:
    """Number of warmup steps: `share` of `num_steps`, rounded up."""
    return ceil(share * num_steps)


def lr_factor(step: int, num_steps: int, warmup: float, min_lr: float) -> float:
    """Factor on each group's peak learning rate at optimizer step `step` (0-based) of `num_steps`.

    Linear warmup over the first `warmup` share of the steps, reaching 1 at its last step, then a cosine decay to
    `min_lr`.
    """
    warm = warmup_steps(num_steps, warmup)
    if step < warm:
        return (step + 1) / warm
    progress = (step + 1 - warm) / max(1, num_steps - warm)
    return min_lr + (1 - min_lr) * (1 + cos(pi * progress)) / 2
