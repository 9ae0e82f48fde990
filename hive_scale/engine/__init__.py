"""The engine protocol: one optimizer step with any kind of sharding, so that the training loop knows no backend."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hive_scale.batch import Batch
from hive_scale.config import EngineConfig, StageConfig
from hive_scale.device import SINGLE, default_precision, exact_fp32, is_accelerator
from hive_scale.distributed import Fragment, World
from hive_scale.engine.optimizer import check_optimizer
from hive_scale.param_groups import ParamGroup

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepOutput:
    """Result of one step, over the whole global batch and all ranks."""

    loss: float  # mean over target tokens, in nats
    grad_norm: float  # L2 norm over all trainable parameters, before clipping; NaN if not finite
    num_tokens: int  # number of target tokens
    applied: bool = True  # False: the step was skipped, no weight and no moment has changed
    votes: tuple[float, ...] = ()  # values of the `votes` callable, summed over ranks

    def metrics(self) -> dict[str, Any]:
        return {"loss": self.loss, "grad_norm": self.grad_norm, "num_tokens": self.num_tokens}


class Loss(Protocol):
    """Sum of the token losses of a micro-batch, in nats. `forward` is the model, wrapped as its sharding needs it."""

    def __call__(self, forward: Callable[..., Tensor], batch: Batch) -> Tensor:
        """Return a scalar tensor. `batch` is on the device. The engines divide the gradient by the count of targets."""
        ...


def token_loss(forward: Callable[..., Tensor], batch: Batch) -> Tensor:
    """The loss of an engine if nobody sets another: next-token cross-entropy, summed over targets."""
    return forward(**batch.inputs())


class StateSharding(NamedTuple):
    """Bytes per parameter element that an engine holds, and the number of ranks that each kind is sharded over.

    An optimizer's states need not have the parameter's shape, so their elements are given by parameter.

    `parameter_*` are of trained parameters, whose gradients and optimizer states follow; `frozen_*` of frozen ones.
    """

    parameter_bytes: int
    parameter_ranks: int
    frozen_bytes: int
    frozen_ranks: int
    gradient_bytes: int
    gradient_ranks: int
    master_bytes: int  # of fp32 masters beside the parameters; 0 if the parameters are the masters
    optimizer_ranks: int
    states: Mapping[str, int]  # fp32 elements of the optimizer's states, by name of the trained parameter


class Engine(Protocol):
    """A model whose parameters, gradients and moments are sharded or replicated over the ranks.

    `step` and `evaluate` are collectives: each rank brings its own micro-batches, the same number on every rank. Both
    call `loss`, which may be replaced, on all ranks alike.
    """

    model: Any
    loss: Loss
    layout: StateSharding

    def step(
        self,
        micro_batches: Sequence[Batch],
        lr_factor: float,
        max_loss: float = inf,
        votes: Callable[[], Sequence[float]] = tuple,
    ) -> StepOutput:
        """Take one optimizer step on the global batch, which is made of all ranks' micro-batches.

        The gradient is that of (sum of token losses) / (number of target tokens), both over all ranks. All ranks skip
        the update if loss or gradient is not finite, or the loss is above `max_loss`. `votes` is called after forward
        and backward; its values are summed over the ranks in the same collective as the loss.
        """
        ...

    def evaluate(self, micro_batches: Iterable[Batch]) -> tuple[float, int]:
        """(sum of token losses in nats, number of target tokens) over all ranks, by one all-reduce; trains nothing."""
        ...

    def fragments(self) -> Iterator[Fragment]:
        """Yield views of the master weights and moments that this rank owns; before the first step moments are zero."""
        ...

    def after_load(self, num_steps: int) -> None:
        """Call it after overwriting the fragments: updates compute copies, and sets the count of optimizer steps."""
        ...


def check_device(config: EngineConfig, of: str) -> None:
    """Raises ValueError for options that this machine's device, of type `of` (`device.kind`), does not support."""
    refused = {
        "engine.precision=bf16": config.precision != "fp32",  # FSDP2, like the next two, needs device collectives
        "engine.cpu_offload=true": config.cpu_offload,
        "engine.ds_config": bool(config.ds_config),
    }
    for what in (what for what, asked in refused.items() if asked and of in SINGLE):
        raise ValueError(
            f"{what} was never tried on a device of type {of}: set engine.precision=fp32 engine.cpu_offload=false, "
            "leave --ds_config out, and see docs/devices.md"
        )
    device = torch.device(of)
    if config.precision == "bf16" and is_accelerator(device) and default_precision(device) != "bf16":
        logger.warning("this GPU has no bf16, and computes it at fp32's speed or slower: set engine.precision=fp32")


def open_engine(
    model: Any,
    groups: Sequence[ParamGroup],
    stage: StageConfig,
    config: EngineConfig,
    world: World,
    weights: Mapping[str, Tensor],
) -> Engine:
    """Shard `model` as `config` asks, and fill it from `weights`. Returns the engine.

    The model's parameters are on the meta device, with ``requires_grad`` set. `weights` are float32, by name. Raises
    ValueError for settings that contradict each other.
    """
    check_optimizer(stage, groups, model, config, world.size)
    if config.precision == "fp32":
        exact_fp32()
    # imported here, since each engine imports its framework, and this module
    if config.ds_config:
        from hive_scale.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, groups, stage, config, world, weights)
    from hive_scale.engine.fsdp import FsdpEngine

    return FsdpEngine(model, groups, stage, config, world, weights)
