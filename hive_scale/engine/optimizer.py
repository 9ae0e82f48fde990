"""The optimizers of all engines: fp32 states, in parameter groups that keep their peak learning rate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hive_scale.config import StageConfig
from hive_scale.distributed import EMA
from hive_scale.param_groups import ParamGroup
from hive_scale.registry import OPTIMIZERS


class OptimizerKind(ABC):
    """Base class of optimizers: what engines, checkpoints and the planner need to know of a torch optimizer.

    The optimizer must be elementwise: engines give it flat shards of parameters, not whole matrices.
    """

    states: ClassVar[tuple[str, ...]]  # keys of its states that have the parameter's shape; fp32, saved in checkpoints
    # key of Adam's second moment, which decays with `StageConfig.betas`[1]; layer statistics read it; "": none
    mean_square: ClassVar[str] = ""
    deepspeed_type: ClassVar[str] = ""  # its name in a DeepSpeed JSON

    def __init__(self, ema: float = 0.0) -> None:
        """`ema` is the decay of an average of the master weights, which is kept beside the states; 0: none."""
        self.ema = ema

    @property
    def kept(self) -> tuple[str, ...]:
        """Keys of all that is kept of a parameter besides its master: its states, and the average if there is one."""
        return (*self.states, EMA) if self.ema else self.states

    @abstractmethod
    def make(self, groups: list[dict[str, Any]], stage: StageConfig) -> torch.optim.Optimizer:
        """Make the optimizer over torch parameter groups, each with ``lr`` and ``weight_decay``."""

    def first_state(self, tensor: Tensor, steps: int) -> dict[str, Tensor]:
        """Initial optimizer state of `tensor`: zero moments, and `steps` steps counted if the optimizer counts."""
        return {state: torch.zeros_like(tensor, requires_grad=False) for state in self.states}

    def begin(self, tensor: Tensor, steps: int) -> dict[str, Tensor]:
        """What is kept of `tensor`, a master, before its first step: its state, and its average, which is itself."""
        average = {EMA: tensor.detach().clone()} if self.ema else {}
        return {**self.first_state(tensor, steps), **average}

    def average(self, optimizer: torch.optim.Optimizer) -> None:
        """Let `optimizer` move the average of each parameter after each of its steps; a skipped step moves none."""
        update: Callable[..., None] = get_ema_multi_avg_fn(self.ema)  # type: ignore[no-untyped-call]

        @torch.no_grad()
        def move(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                masters = [one for one in group["params"] if EMA in optimizer.state[one]]
                if masters:
                    update([optimizer.state[one][EMA] for one in masters], [one.detach() for one in masters], 1)

        optimizer.register_step_post_hook(move)


@OPTIMIZERS.register("adamw")
class AdamW(OptimizerKind):
    """torch's fused AdamW, which runs on GPUs and CPUs and needs no compiled extension."""

    states = ("exp_avg", "exp_avg_sq")
    mean_square = "exp_avg_sq"
    deepspeed_type = "AdamW"

    def make(self, groups: list[dict[str, Any]], stage: StageConfig) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, betas=stage.betas, eps=stage.eps, fused=True)

    def first_state(self, tensor: Tensor, steps: int) -> dict[str, Tensor]:
        count = torch.full((), float(steps), device=tensor.device)
        return {"step": count, **super().first_state(tensor, steps)}


def optimizer_kind(stage: StageConfig) -> OptimizerKind:
    """An instance of the class registered as ``stages.*.optimizer``."""
    made: OptimizerKind = OPTIMIZERS[stage.optimizer](stage.ema)
    return made


def make_optimizer(
    parameters: Mapping[str, Tensor], groups: Sequence[ParamGroup], stage: StageConfig
) -> torch.optim.Optimizer:
    """Make the stage's optimizer over the parameters named in `groups`."""
    kind = optimizer_kind(stage)
    optimizer = kind.make(
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
    if kind.ema:
        kind.average(optimizer)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's learning rate to its peak times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def set_steps(state: Mapping[str, Tensor], steps: int) -> None:
    """Set the step count in one parameter's optimizer state, if the optimizer has one."""
    if "step" in state:
        state["step"].fill_(steps)


@contextmanager
def skip_update(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Context in which `optimizer.step()` changes no weight and no state."""
    holder: Any = optimizer
    holder.step = lambda *_, **__: None  # an instance attribute, which hides the class's method
    try:
        yield
    finally:
        del holder.step
