"""The optimizers of all engines: fp32 states, in parameter groups that keep their peak learning rate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hive_scale.config import EngineConfig, StageConfig
from hive_scale.distributed import EMA
from hive_scale.param_groups import ParamGroup
from hive_scale.registry import OPTIMIZERS

Shape = tuple[int, ...]
ADAMW = "stages.*.optimizer=adamw"


class OptimizerKind(ABC):
    """Base class of optimizers: what engines, checkpoints and the planner need to know of a torch optimizer."""

    states: ClassVar[tuple[str, ...]]  # keys of its states; fp32, saved in checkpoints
    # How an engine may cut what it gives the optimizer. "elements": as it likes, into flat ranges, since the update is
    # elementwise; "rows": DTensors of whole matrices, cut by rows, as FSDP2 has; "nothing": whole tensors alone
    cut: ClassVar[Literal["elements", "rows", "nothing"]] = "elements"
    deepspeed_type: ClassVar[str] = ""  # its name in a DeepSpeed JSON

    def __init__(self, ema: float = 0.0) -> None:
        """`ema` is the decay of an average of the master weights, which is kept beside the states; 0: none."""
        self.ema = ema

    @abstractmethod
    def make(self, groups: list[dict[str, Any]], stage: StageConfig) -> torch.optim.Optimizer:
        """Make the optimizer over torch parameter groups, each with ``lr``, ``weight_decay`` and ``matrices``.

        ``matrices`` is that of `ParamGroup`.
        """

    def divide(self, groups: Sequence[ParamGroup], matrices: Collection[str]) -> list[ParamGroup]:
        """`groups`, such that each has parameters alone that are updated alike.

        `matrices` are the names of the model's hidden matrices (`Hive.matrices`).
        """
        return list(groups)

    def state_shapes(self, shape: Shape, is_matrix: bool) -> dict[str, Shape]:
        """Shapes of the states of a parameter of `shape`, by key; `is_matrix`: of a group of ``matrices``."""
        return dict.fromkeys(self.states, shape)

    def first_state(self, tensor: Tensor, steps: int, is_matrix: bool) -> dict[str, Tensor]:
        """Initial optimizer state of `tensor`: zero moments, and `steps` steps counted if the optimizer counts."""
        return {
            # of a DTensor, zeros in its shape are cut as it is
            state: torch.zeros_like(tensor, requires_grad=False) if shape == tensor.shape else tensor.new_zeros(shape)
            for state, shape in self.state_shapes(tuple(tensor.shape), is_matrix).items()
        }

    def square_factor(self, state: str, shape: Shape, steps: int, stage: StageConfig) -> float:
        """Mean squares of the gradient of a parameter of `shape`, added up, per sum of its `state` after `steps` steps.

        0: this state does not tell them.
        """
        return 0.0

    def update_flops(self, shape: Shape, is_matrix: bool) -> float:
        """FLOPs of matrix products in the step of a parameter of `shape`, in bf16; 0 for an elementwise update."""
        return 0.0

    def begin(self, tensor: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """What is kept of `tensor`, a master, before its first step: its state, and its average, which is itself.

        `group` is the optimizer's group that has the tensor.
        """
        average = {EMA: tensor.detach().clone()} if self.ema else {}
        return {**self.first_state(tensor, group["steps_behind"], group["matrices"]), **average}

    def kept(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What checkpoints have of a parameter's `state` besides its master: moments, and the average if any."""
        return {key: state[key] for key in (*self.states, EMA) if key in state}

    def kept_shapes(self, groups: Sequence[ParamGroup], shapes: Mapping[str, Shape]) -> dict[str, list[Shape]]:
        """Shapes of what is kept of each parameter in `groups` besides its master, from the `shapes` of parameters."""
        return {
            name: [*self.state_shapes(shapes[name], group.matrices).values(), *([shapes[name]] if self.ema else [])]
            for group in groups
            for name in group.parameters
        }

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

    states: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    deepspeed_type = "AdamW"

    def make(self, groups: list[dict[str, Any]], stage: StageConfig) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, betas=stage.betas, eps=stage.eps, fused=True)

    def first_state(self, tensor: Tensor, steps: int, is_matrix: bool) -> dict[str, Tensor]:
        count = torch.full((), float(steps), device=tensor.device)
        return {"step": count, **super().first_state(tensor, steps, is_matrix)}

    def square_factor(self, state: str, shape: Shape, steps: int, stage: StageConfig) -> float:
        return 1 / (1 - stage.betas[1] ** steps) if state == "exp_avg_sq" else 0.0


class Together(torch.optim.Optimizer):
    """Several optimizers, each of its own parameters, as one. Groups and states are shared with them."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step of each. `closure` is for torch, and must be None."""
        for part in self.parts:
            part.step()


@OPTIMIZERS.register("muon")
class Muon(OptimizerKind):
    """torch's Muon for the weights of linear layers, and AdamW for the rest: embeddings, head, convolutions, vectors.

    A matrix's step is scaled to the size of AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training"), so that
    both take the same learning rates and weight decays.
    """

    states = ("momentum_buffer", *AdamW.states)
    cut = "rows"

    def __init__(self, ema: float = 0.0) -> None:
        super().__init__(ema)
        self.rest = AdamW()

    def divide(self, groups: Sequence[ParamGroup], matrices: Collection[str]) -> list[ParamGroup]:
        divided = []
        for group in groups:
            for is_matrix in (True, False):
                names = tuple(name for name in group.parameters if (name in matrices) == is_matrix)
                divided += [replace(group, parameters=names, matrices=is_matrix)] if names else []
        return divided

    def make(self, groups: list[dict[str, Any]], stage: StageConfig) -> torch.optim.Optimizer:
        of = {is_matrix: [group for group in groups if group["matrices"] == is_matrix] for is_matrix in (True, False)}
        parts: list[torch.optim.Optimizer] = []
        if of[True]:
            parts.append(torch.optim.Muon(of[True], adjust_lr_fn="match_rms_adamw"))
        if of[False]:
            parts.append(self.rest.make(of[False], stage))
        return Together(parts)

    def state_shapes(self, shape: Shape, is_matrix: bool) -> dict[str, Shape]:
        return {"momentum_buffer": shape} if is_matrix else self.rest.state_shapes(shape, is_matrix)

    def first_state(self, tensor: Tensor, steps: int, is_matrix: bool) -> dict[str, Tensor]:
        if is_matrix:
            return super().first_state(tensor, steps, is_matrix)
        return self.rest.first_state(tensor, steps, is_matrix)

    def update_flops(self, shape: Shape, is_matrix: bool) -> float:
        """Five Newton-Schulz iterations: X X', its square, and their product with X, for X of m <= n."""
        m, n = sorted(shape) if is_matrix else (0, 0)
        return 5.0 * (4 * m * m * n + 2 * m**3)


@OPTIMIZERS.register("adafactor")
class Adafactor(OptimizerKind):
    """torch's Adafactor: of a matrix it keeps mean squares by row and by column alone (Shazeer and Stern 2018).

    torch multiplies the learning rate by the RMS of the weights, or by eps[1] if that is more. With 1 it is AdamW's
    learning rate, unless weights are larger; with torch's 1e-3, gates that begin at zero would hardly open.
    """

    states = ("row_var", "col_var", "variance")
    cut = "nothing"  # with DTensors torch 2.14 takes the norm of a shard for that of the whole

    def make(self, groups: list[dict[str, Any]], stage: StageConfig) -> torch.optim.Optimizer:
        # eps[0] bounds mean squares, not their roots as AdamW's. torch's own, 1e-7, is above those of a clipped
        # gradient of many elements. torch squares it, too, which must not give zero
        return torch.optim.Adafactor(groups, eps=(max(stage.eps**2, 1e-18), 1.0))

    def state_shapes(self, shape: Shape, is_matrix: bool) -> dict[str, Shape]:
        if len(shape) < 2:
            return {"variance": shape}
        return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}

    def first_state(self, tensor: Tensor, steps: int, is_matrix: bool) -> dict[str, Tensor]:
        return {"step": torch.tensor(float(steps)), **super().first_state(tensor, steps, is_matrix)}  # on the host

    def square_factor(self, state: str, shape: Shape, steps: int, stage: StageConfig) -> float:
        return {"row_var": float(shape[-1]) if shape else 0.0, "variance": 1.0}.get(state, 0.0)


def numels(shapes: Mapping[str, Sequence[Shape]]) -> dict[str, int]:
    """Elements in all of the tensors of each name."""
    return {name: sum(map(prod, each)) for name, each in shapes.items()}


def optimizer_kind(stage: StageConfig) -> OptimizerKind:
    """An instance of the class registered as ``stages.*.optimizer``."""
    made: OptimizerKind = OPTIMIZERS[stage.optimizer](stage.ema)
    return made


def check_optimizer(
    stage: StageConfig, groups: Sequence[ParamGroup], model: Any, config: EngineConfig, world_size: int
) -> None:
    """Raises ValueError if the stage's optimizer cannot run as `config` shards `model` over `world_size` processes.

    `groups` are those of `apply_trainable_groups`, and the parameters of `model` are not sharded yet.
    """
    divided = optimizer_kind(stage).divide(groups, model.matrices())
    shapes = {name: tuple(one.shape) for name, one in model.named_parameters()}
    if why := refusal(stage, divided, shapes, config, world_size):
        raise ValueError(why)


def refusal(
    stage: StageConfig,
    groups: Sequence[ParamGroup],
    shapes: Mapping[str, Shape],
    config: EngineConfig,
    world_size: int,
) -> str:
    """Why `check_optimizer` refuses parameters of these `shapes`, with the remedy; "" if it does not.

    `groups` are those of `OptimizerKind.divide`.
    """
    name, cut, shard = stage.optimizer, optimizer_kind(stage).cut, config.shard_size or world_size
    if cut == "elements":
        return ""
    if config.ds_config:
        instead = "for FSDP2 or DDP" if cut == "rows" else "and set engine.shard_size=1 for DDP"
        return (
            f"optimizer={name} needs tensors in their shapes, and DeepSpeed flattens them: leave engine.ds_config "
            f"empty, {instead}, or set {ADAMW}"
        )
    if config.cpu_offload:
        return f"optimizer={name} is not for tensors in host memory: set engine.cpu_offload=false, or {ADAMW}"
    if cut == "nothing" and shard > 1:
        return f"optimizer={name} needs whole tensors, and FSDP2 cuts them: set engine.shard_size=1 for DDP, or {ADAMW}"
    if 1 < shard < world_size:
        # torch spreads the products over the copies, too, and warns that their sums may differ between ranks
        return (
            f"optimizer={name} might let the copies of an HSDP model drift apart: set engine.shard_size=0 for FSDP2, 1 "
            f"for DDP, or {ADAMW}"
        )
    rows = {one: shapes[one][0] for group in groups if group.matrices for one in group.parameters}
    least = min(rows, key=rows.__getitem__, default="")
    if least and rows[least] < shard:
        return (
            f"optimizer={name}: {least} has {rows[least]} rows, too few for a shard on each of {shard} processes: set "
            f"engine.shard_size=1 for DDP, or {ADAMW}"
        )
    return ""


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
                "matrices": group.matrices,
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
