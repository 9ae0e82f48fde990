"""Bytes of the model's state per process: planned, by arithmetic, and found in the engine.

Activations and communication buffers are not included: they depend on batch and schedule.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from hive_scale.device import free_unused
from hive_scale.engine import Engine

# below the table of `report`
LEGEND = """\
  planned (held before the first step); gradients exist within steps only. Optimizer: its states, and fp32 masters
  where parameters are not fp32. Activations, batches and buffers are not in this table. GB below is the peak of all."""


@dataclass
class Bytes:
    """Bytes of one component in this process. Gradients and optimizer cover trained parameters only."""

    parameters: float = 0
    gradients: float = 0
    optimizer: float = 0


def planned(engine: Engine) -> dict[str, Bytes]:
    """Bytes by component according to the engine's `layout`, without padding."""
    layout, result = engine.layout, defaultdict[str, Bytes](Bytes)
    for name, parameter in engine.model.named_parameters():
        part, numel = result[_component(name)], getattr(parameter, "ds_numel", parameter.numel())
        if not parameter.requires_grad:
            part.parameters += numel * layout.frozen_bytes / layout.frozen_ranks
        else:
            part.parameters += numel * layout.parameter_bytes / layout.parameter_ranks
            part.gradients += numel * layout.gradient_bytes / layout.gradient_ranks
            kept = numel * layout.master_bytes + 4 * layout.states[name]
            part.optimizer += kept / layout.optimizer_ranks
    return dict(result)


def found(engine: Engine) -> dict[str, Bytes]:
    """Bytes by component that this process holds now. Gradients exist only between a backward and its step."""
    result, named = defaultdict[str, Bytes](Bytes), list(engine.model.named_parameters())
    for name, parameter in named:
        part = result[_component(name)]
        part.parameters += sum(_nbytes(tensor) for tensor in _held(parameter))
        part.gradients += 0 if parameter.grad is None else _nbytes(parameter.grad)
    parameters = {_local(tensor).untyped_storage().data_ptr() for _, one in named for tensor in _held(one)}
    for fragment in engine.fragments():
        if not (fragment.kind == "master" and fragment.data.untyped_storage().data_ptr() in parameters):
            result[_component(fragment.name)].optimizer += fragment.data.nbytes
    return dict(result)


def report(engine: Engine) -> str:
    """A table in MB: parameters, gradients and optimizer by component, planned and, in brackets, found."""
    plan, real = planned(engine), found(engine)
    lines = [f"{'MB per process':<16}{'parameters':>20}{'gradients':>12}{'optimizer':>20}"]
    for component, want in (plan | {"all": _sum(plan)}).items():
        have = _sum(real) if component == "all" else real[component]
        lines.append(
            f"{component:<16}{_pair(want.parameters, have.parameters)}"
            f"{want.gradients / 1e6:>12.1f}{_pair(want.optimizer, have.optimizer)}"
        )
    return "\n".join(lines)


def release() -> None:
    """Free memory of past engines, which FSDP2 and DeepSpeed tie up in reference cycles, and reset the peaks."""
    gc.collect()
    free_unused()


def _component(name: str) -> str:
    return name.split(".")[0]


def _held(parameter: Any) -> Iterator[Tensor]:
    """Yield the tensors of `parameter` in this process: whole, a shard, or (ZeRO-3) a shard and the gathered whole."""
    if hasattr(parameter, "ds_tensor"):
        yield parameter.ds_tensor
    yield parameter.detach()


def _nbytes(tensor: Tensor) -> int:
    return _local(tensor).nbytes


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sum(parts: Mapping[str, Bytes]) -> Bytes:
    columns = zip(*((part.parameters, part.gradients, part.optimizer) for part in parts.values()), strict=True)
    return Bytes(*(sum(column) for column in columns))


def _pair(planned_bytes: float, found_bytes: float) -> str:
    return f"{planned_bytes / 1e6:>10.1f} ({found_bytes / 1e6:>6.1f})"
