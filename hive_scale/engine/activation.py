"""Activation checkpointing: which blocks forget their activations and compute them again in backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hive_scale.config import CheckpointingConfig

# What "selective" keeps: the results that cost most to compute again.
_ATEN = torch.ops.aten
KEPT = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
}


def blocks_of(model: Any) -> list[nn.Module]:
    """The repeated modules of every component: what is sharded, filled and compiled one by one."""
    return [block for blocks in model.blocks().values() for block in blocks]


def checkpoint_blocks(blocks: Mapping[str, Sequence[nn.Module]], config: CheckpointingConfig) -> None:
    """Wrap the forward of each block of a component as `config` asks. Call it before sharding.

    Only ``forward`` is wrapped, so an engine's gathering hooks, which sit around it, fire for the
    recomputation as well, and parameter names stay as they are.
    """
    for component, modules in blocks.items():
        mode = getattr(config, component)
        if mode == "none":
            continue
        extra: dict[str, Any] = {}
        if mode == "selective":
            extra["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
        for module in modules:
            module.forward = partial(checkpoint, module.forward, use_reentrant=False, **extra)


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
