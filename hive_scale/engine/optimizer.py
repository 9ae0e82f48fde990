"""The optimizers of every engine: fp32 states, in groups that keep their peak learning rate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from hive_scale.config import StageConfig
from hive_scale.param_groups import ParamGroup
from hive_scale.registry import OPTIMIZERS


class OptimizerKind(ABC):
    """What engines, checkpoints and the planner ask about an optimizer; an entry answers for one of torch's kind.

    It steps every number of a parameter by itself: engines hand it flat parts of parameters, not whole matrices.
    """

    states: ClassVar[tuple[str, ...]]  # keys of what it keeps, in a parameter's shape and float32, as checkpoints do
    # Adam's mean square of gradients among these, its decay `StageConfig.betas`[1]: gradients of layers are read off it
    mean_square: ClassVar[str] = ""
    deepspeed_type: ClassVar[str] = ""  # what a DeepSpeed JSON may call it

    @abstractmethod
    def make(self, groups: list[dict[str, Any]], stage: StageConfig) -> torch.optim.Optimizer:
        """Over torch's parameter groups, which have ``lr`` and ``weight_decay``."""

    def first_state(self, tensor: Tensor, steps: int) -> dict[str, Tensor]:
        """The state that the first step would give `tensor`, before it, with another number of `steps` done."""
        return {state: torch.zeros_like(tensor, requires_grad=False) for state in self.states}


@OPTIMIZERS.register("adamw")
class AdamW(OptimizerKind):
    """torch's, fused, which runs on GPUs and CPUs and compiles nothing."""

    states = ("exp_avg", "exp_avg_sq")
    mean_square = "exp_avg_sq"
    deepspeed_type = "AdamW"

    def make(self, groups: list[dict[str, Any]], stage: StageConfig) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, betas=stage.betas, eps=stage.eps, fused=True)

    def first_state(self, tensor: Tensor, steps: int) -> dict[str, Tensor]:
        count = torch.full((), float(steps), device=tensor.device)
        return {"step": count, **super().first_state(tensor, steps)}


def optimizer_kind(stage: StageConfig) -> OptimizerKind:
    """The entry that ``stages.*.optimizer`` names."""
    made: OptimizerKind = OPTIMIZERS[stage.optimizer]()
    return made


def make_optimizer(
    parameters: Mapping[str, Tensor], groups: Sequence[ParamGroup], stage: StageConfig
) -> torch.optim.Optimizer:
    """The stage's optimizer over the parameters that `groups` name."""
    return optimizer_kind(stage).make(
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
        stage,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Of every group: its peak times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def set_steps(state: Mapping[str, Tensor], steps: int) -> None:
    """Of one parameter's state, if its optimizer counts."""
    if "step" in state:
        state["step"].fill_(steps)


@contextmanager
def skip_update(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Steps within change no weight and no state, whatever the gradients are."""
    holder: Any = optimizer
    holder.step = lambda *_, **__: None  # over the method of the class
    try:
        yield
    finally:
        del holder.step
