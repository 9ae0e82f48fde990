"""One optimizer step on any sharding. The loop sees this protocol and never learns which engine it drives."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from hive_scale.batch import Batch
from hive_scale.config import EngineConfig, StageConfig
from hive_scale.device import SINGLE, exact_fp32
from hive_scale.distributed import Fragment, World
from hive_scale.param_groups import ParamGroup

COMPILERS = ("g++", "clang++", "c++")


@dataclass(frozen=True)
class StepOutput:
    """What one step was, over the whole global batch and all ranks."""

    loss: float  # mean over target tokens, nats
    grad_norm: float  # L2 over all trainable parameters, before clipping; NaN if it was not finite
    num_tokens: int  # target tokens
    applied: bool = True  # or left out, with no weight and no moment changed
    votes: tuple[float, ...] = ()  # what the ranks asked for, added up

    def metrics(self) -> dict[str, Any]:
        return {"loss": self.loss, "grad_norm": self.grad_norm, "num_tokens": self.num_tokens}


class StateSharding(NamedTuple):
    """Bytes that an engine holds per number of a parameter, and over how many ranks it cuts them."""

    parameter_bytes: int
    parameter_ranks: int
    gradient_bytes: int
    gradient_ranks: int
    optimizer_bytes: int
    optimizer_ranks: int


class Engine(Protocol):
    """A model whose parameters, gradients and moments are cut over the ranks in some way.

    `step` and `evaluate` are collectives: each rank brings its own micro-batches, equally many on every rank.
    """

    model: Any
    layout: StateSharding

    def step(
        self,
        micro_batches: Sequence[Batch],
        lr_factor: float,
        max_loss: float = inf,
        votes: Callable[[], Sequence[float]] = tuple,
    ) -> StepOutput:
        """One optimizer step on the global batch that all ranks' micro-batches make up.

        The gradient is that of (sum of token losses) / (number of target tokens), both over all ranks. The step is
        left out by all ranks alike if loss or gradient is not finite, or the loss is above `max_loss`. `votes` is
        called when forward and backward are done; its values are added up over the ranks along with the loss.
        """
        ...

    def evaluate(self, micro_batches: Iterable[Batch]) -> tuple[float, int]:
        """(sum of token losses, number of target tokens) over all ranks, in one reduction; nothing is trained."""
        ...

    def fragments(self) -> Iterator[Fragment]:
        """Masters and moments that this rank owns, as views; moments exist (zero) before the first step."""
        ...

    def after_load(self, num_steps: int) -> None:
        """After the fragments were overwritten: renew compute copies, set the stage's count of optimizer steps."""
        ...


def check_compiler(config: EngineConfig) -> None:
    """Raises ValueError where blocks are to be compiled on a machine that cannot: torch says so within a step."""
    if config.compile and not any(map(shutil.which, filter(None, (os.environ.get("CXX"), *COMPILERS)))):
        raise ValueError(
            "engine.compile=true needs a C++ compiler, and there is none here: install g++, name one in CXX, or set "
            "engine.compile=false (all else works without)"
        )


def check_device(config: EngineConfig, of: str) -> None:
    """Raises ValueError for what no device of type `of` (`device.kind`) can do in the one process that it is given."""
    refused = {
        "engine.precision=bf16": config.precision != "fp32",  # FSDP2, as what follows, needs collectives of the device
        "engine.cpu_offload=true": config.cpu_offload,
        "engine.ds_config": bool(config.ds_config),
    }
    for what in (what for what, asked in refused.items() if asked and of in SINGLE):
        raise ValueError(
            f"{what} was never tried on a device of type {of}: set engine.precision=fp32 engine.cpu_offload=false, "
            "leave --ds_config out, and see docs/devices.md"
        )


def open_engine(
    model: Any,
    groups: Sequence[ParamGroup],
    stage: StageConfig,
    config: EngineConfig,
    world: World,
    weights: Mapping[str, Tensor],
) -> Engine:
    """Shard `model` (parameters on the meta device, ``requires_grad`` set) as `config` asks; fill it from `weights`."""
    if config.precision == "fp32":
        exact_fp32()
    # imported here: each engine brings its framework, and each imports this module
    if config.ds_config:
        from hive_scale.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, groups, stage, config, world, weights)
    from hive_scale.engine.fsdp import FsdpEngine

    return FsdpEngine(model, groups, stage, config, world, weights)
