"""Activations that compiled blocks spare: torch's compiler recomputes some of what eager operators would save.

What it saves is its own choice, a min-cut of each block's graph, so it is asked: each kind of block is run once as it
is and once compiled, on the CPU with two samples, and the tensors that are saved for the backward are counted. The
backend makes the compiler's graphs of forward and backward, and runs them with eager kernels: nothing is built.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map_only

from hive_scale.config import CheckpointingConfig
from hive_scale.plan.trace import Input, Trace

log = logging.getLogger(__name__)
GRAPHS = "aot_eager_decomp_partition"  # one of torch.compiler.list_backends
SAMPLES = 2  # torch would compile for one sample alone


def spare(traced: Trace, model: Any, dtype: torch.dtype, checkpointing: CheckpointingConfig) -> None:
    """Take from `traced` what compiled blocks do not hold between their forward and their backward.

    `model` is the one that was traced, built anew on the meta device. Blocks that are recomputed as a whole or in part
    are left as they are: of these the trace holds little.
    """
    found: dict[str, float] = {}
    known: dict[str, float] = {}
    for component, blocks in model.blocks().items():
        if getattr(checkpointing, component) != "none":
            continue
        names = {block: name for name, block in model.named_modules()}
        for block in blocks:
            if call := traced.calls.get(names[block]):
                key = f"{type(block)} {[(one.shape, one.requires_grad) for one in block.parameters()]} {call}"
                if key not in known:
                    known[key] = _spared(block, call, dtype)
                found[names[block]] = known[key]
    if known:
        torch.compiler.reset()  # what was compiled here must not count towards the limit of a run's own blocks
    _take(traced, found)


def _take(traced: Trace, spared: Mapping[str, float]) -> None:
    ends = {event.name: event.at for event in traced.events if event.kind == "forward end"}
    begins = {event.name: event.at for event in reversed(traced.events) if event.kind == "backward"}
    for name, size in spared.items():
        for at in range(ends[name], begins.get(name, ends[name])):
            traced.per_sample[at] -= size


def _spared(block: nn.Module, call: Any, dtype: torch.dtype) -> float:
    """Bytes per sample that `block` saves less when compiled. It is left on the meta device."""
    learns = any(one.requires_grad for one in block.parameters())
    if not learns and not any(isinstance(one, Input) and one.requires_grad for one in tree_leaves(call)):
        return 0.0
    block.to_empty(device="cpu").to(dtype)
    args, kwargs = tree_map_only(Input, lambda one: one.real(SAMPLES), call)
    eager = _saved(block, args, kwargs)
    block.compile(backend=GRAPHS)
    try:
        compiled = _saved(block, args, kwargs)
    except Exception as error:  # the compiler may raise anything; what is planned then is what the eager block holds
        log.info("%s is planned as if it were not compiled: %s", type(block).__name__, error)
        compiled = eager
    block.to("meta")
    return (eager - compiled) / SAMPLES


def _saved(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Bytes of tensors, other than parameters, that a forward saves for its backward."""
    held: dict[int, Tensor] = {}
    parameters = {one.untyped_storage().data_ptr() for one in block.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in parameters:
            held[place] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        block(*args, **kwargs)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())
