"""The one optimizer of every engine: AdamW with fp32 moments, in groups that keep their peak learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hive_scale.config import StageConfig
from hive_scale.param_groups import ParamGroup

MOMENTS = ("exp_avg", "exp_avg_sq")


def adamw(parameters: Mapping[str, Tensor], groups: Sequence[ParamGroup], stage: StageConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that `groups` name. Fused, which runs on GPUs and CPUs and compiles nothing."""
    return torch.optim.AdamW(
        [
            {
                "params": [parameters[name] for name in group.parameters],
                "lr": group.lr,
                "peak_lr": group.lr,
                "steps_behind": group.steps_behind,
                "weight_decay": group.weight_decay,
            }
            for group in groups
        ],
        betas=stage.betas,
        eps=stage.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


@contextmanager
def skip_update(optimizer: torch.optim.AdamW) -> Iterator[None]:
    """Steps within change no weight, no moment and no step count, whatever the gradients are."""
    # by the mark that torch's fused kernels know from mixed precision's loss scaling
    mark: Any = optimizer
    mark.found_inf = torch.ones(())
    try:
        yield
    finally:
        del mark.found_inf


def zero_state(tensor: Tensor, steps: int) -> dict[str, Tensor]:
    """The state that AdamW gives `tensor` in its first step, before it, with another number of `steps` done."""
    return {
        "step": torch.full((), float(steps), device=tensor.device),
        **{moment: torch.zeros_like(tensor, requires_grad=False) for moment in MOMENTS},
    }
