"""The learning rate as a pure function of the step: nothing to save, easy to plot."""

from __future__ import annotations

from math import ceil, cos, pi


def warmup_steps(num_steps: int, share: float) -> int:
    """Of `num_steps`, those in which the learning rate rises."""
    return ceil(share * num_steps)


def lr_factor(step: int, num_steps: int, warmup: float, min_lr: float) -> float:
    """Factor on every group's peak for optimizer step `step` (0-based) of `num_steps`.

    Linear over the first `warmup` share, reaching 1 with its last step, then a cosine that ends at `min_lr`.
    """
    warm = warmup_steps(num_steps, warmup)
    if step < warm:
        return (step + 1) / warm
    progress = (step + 1 - warm) / max(1, num_steps - warm)
    return min_lr + (1 - min_lr) * (1 + cos(pi * progress)) / 2
