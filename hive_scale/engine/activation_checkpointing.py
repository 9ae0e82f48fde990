"""Activation checkpointing: which blocks drop their activations in forward and recompute them in backward."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hive_scale.config import CheckpointingConfig

# Operators whose results "selective" saves: they cost most to recompute.
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
    """The repeated modules of all components: the units of sharding, filling and compiling."""
    return [block for blocks in model.blocks().values() for block in blocks]


def checkpoint_blocks(
    blocks: Mapping[str, Sequence[nn.Module]], config: CheckpointingConfig, gathers_within: bool = False
) -> None:
    """Wrap the forward of each component's blocks as `config` asks. Call it before sharding.

    Only ``forward`` is wrapped. So an engine's all-gather hooks, which sit around it, fire for the recomputation as
    well, and parameter names do not change. Set `gathers_within` if there are hooks inside the blocks, too (ZeRO-3):
    their operators differ between forward and recomputation, which torch's own selective contexts refuse.
    """
    for component, modules in blocks.items():
        mode = getattr(config, component)
        if mode == "none":
            continue
        extra: dict[str, Any] = {}
        if mode == "selective":
            torchs = partial(create_selective_checkpoint_contexts, _policy)
            extra["context_fn"] = _save_and_replay if gathers_within else torchs
        for module in modules:
            module.forward = partial(checkpoint, module.forward, use_reentrant=False, **extra)


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _save_and_replay() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Contexts of forward and recomputation that consider only the operators in KEPT, and ignore all others."""
    kept: deque[Any] = deque()
    return _SaveOutputs(kept), _ReplayOutputs(kept)


class _SaveOutputs(TorchDispatchMode):
    def __init__(self, kept: deque[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in KEPT:
            # cloned, since ZeRO-3's linear adds its bias to the result in place
            self.kept.append(tree_map_only(Tensor, Tensor.clone, result))
        return result


class _ReplayOutputs(_SaveOutputs):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.kept.popleft() if func in KEPT else func(*args, **(kwargs or {}))
