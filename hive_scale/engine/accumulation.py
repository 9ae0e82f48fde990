"""What engines have in common: how micro-batches add up, whether all ranks take a step, a loss without one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hive_scale.batch import Batch
from hive_scale.distributed import World


def accumulate(
    world: World, micro_batches: Sequence[Batch], run: Callable[[Batch, float, bool], Tensor]
) -> tuple[Tensor, float]:
    """This rank's sum of token losses, a scalar, and the number of target tokens on all ranks.

    `run(batch, scale, is_last)` is a forward and the backward of its loss times `scale`; it returns the loss.
    """
    world.pulse.enter("reduce")
    (num_tokens,) = world.sum(sum(batch.num_tokens for batch in micro_batches))
    # reduction averages over ranks, so the ranks' number is multiplied back in
    scale = world.size / max(1.0, num_tokens)
    total = torch.zeros((), device=world.device)
    for index, batch in enumerate(micro_batches):
        total += run(batch, scale, index == len(micro_batches) - 1)
    world.pulse.enter("reduce")
    return total, num_tokens


def conclude(
    world: World, total: Tensor, num_tokens: float, max_loss: float, votes: Callable[[], Sequence[float]]
) -> tuple[float, bool, tuple[float, ...]]:
    """The mean loss over all ranks, whether it is fit to learn from, and the ranks' votes added up."""
    loss_sum, *voted = world.sum(total.item(), *votes())
    mean = loss_sum / max(1.0, num_tokens)
    world.pulse.enter("update")
    return mean, math.isfinite(mean) and mean <= max_loss, tuple(voted)


@torch.no_grad()
def held_out(
    world: World, model: nn.Module, micro_batches: Sequence[Batch], loss_of: Callable[[Batch], Tensor]
) -> tuple[float, int]:
    """The sum of token losses without dropout, and the number of target tokens, over all ranks."""
    model.eval()
    try:
        loss = sum(loss_of(batch).item() for batch in micro_batches)
    finally:
        model.train()
    total, count = world.sum(loss, sum(batch.num_tokens for batch in micro_batches))
    return total, int(count)
