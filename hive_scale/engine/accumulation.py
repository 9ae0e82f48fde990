"""What engines have in common: how micro-batches add up, whether all ranks take a step, a loss without one.

Backward passes give the gradient of the sum of token losses. How many tokens all ranks have is known when that is
done, from the one collective of a step that goes over the host; the optimizer then divides by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hive_scale.batch import Batch
from hive_scale.distributed import World


class StepTotals(NamedTuple):
    """Of one step, over all ranks."""

    mean_loss: float  # over the target tokens
    num_tokens: int
    is_fit: bool  # to learn from
    votes: tuple[float, ...]
    divisor: float  # of the sum of losses' gradient, at least 1


def accumulate(world: World, micro_batches: Sequence[Batch], run: Callable[[Batch, bool], Tensor]) -> Tensor:
    """This rank's sum of token losses, a scalar on the device.

    `run(batch, is_last)` is a forward and the backward of its loss; it returns the loss.
    """
    total = torch.zeros((), device=world.device)
    for index, batch in enumerate(micro_batches):
        total += run(batch, index == len(micro_batches) - 1)
    world.timer.enter("reduce")
    return total


def reduce_loss(
    world: World,
    total: Tensor,
    micro_batches: Sequence[Batch],
    max_loss: float,
    votes: Callable[[], Sequence[float]],
) -> StepTotals:
    """What all ranks now know of the step, from `total`, this rank's sum of losses. A collective."""
    own_tokens = sum(batch.num_tokens for batch in micro_batches)
    loss_sum, num_tokens, *voted = world.sum(total.item(), own_tokens, *votes())
    mean = loss_sum / max(1.0, num_tokens)
    world.timer.enter("update")
    is_fit = math.isfinite(mean) and mean <= max_loss
    return StepTotals(mean, int(num_tokens), is_fit, tuple(voted), max(1.0, num_tokens))


@torch.no_grad()
def evaluate_batches(
    world: World, model: nn.Module, micro_batches: Iterable[Batch], loss_of: Callable[[Batch], Tensor]
) -> tuple[float, int]:
    """The sum of token losses without dropout, and the number of target tokens, over all ranks.

    Neither the host nor another rank is waited for before the end.
    """
    losses, own_tokens = [torch.zeros((), device=world.device)], 0
    world.timer.enter("evaluate")
    model.eval()
    try:
        for batch in micro_batches:
            losses.append(loss_of(batch))
            own_tokens += batch.num_tokens
            world.timer.enter("evaluate")  # each is a sign of life
    finally:
        model.train()
    total, count = world.sum(math.fsum(torch.stack(losses).tolist()), own_tokens)
    return total, int(count)
