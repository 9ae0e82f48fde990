"""Shared parts of the engines: gradient accumulation, the decision whether to apply a step, and evaluation.

Backward passes accumulate the gradient of the sum of token losses. The number of target tokens on all ranks comes
afterwards, with the step's one host-side collective; the optimizer then divides by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hive_scale.batch import Batch
from hive_scale.device import CopyStream
from hive_scale.distributed import World
from hive_scale.engine import Loss
from hive_scale.engine.compilation import TOKENS


class StepTotals(NamedTuple):
    """Totals of one step over all ranks."""

    mean_loss: float  # per target token, in nats
    num_tokens: int
    is_fit: bool  # False: the loss is not finite or too high, the step must be skipped
    votes: tuple[float, ...]
    divisor: float  # number of target tokens, at least 1; divides the gradient of the summed loss


def accumulate(
    world: World, micro_batches: Sequence[Batch], is_compiled: bool, run: Callable[[Batch, bool], Tensor]
) -> Tensor:
    """Run every micro-batch, and return this rank's sum of token losses, a scalar tensor on the device.

    `run(batch, is_last)` does a forward and a backward of a batch on the device, and returns the loss.
    """
    total = torch.zeros((), device=world.device)
    for index, batch in enumerate(placed(micro_batches, world, is_compiled)):
        total += run(batch, index == len(micro_batches) - 1)
    world.timer.enter("reduce")
    return total


def placed(micro_batches: Sequence[Batch], world: World, is_compiled: bool) -> Iterator[Batch]:
    """Yield each micro-batch on this rank's device. On CUDA the next one is copied while the present one is used."""
    stream = CopyStream(world.device)

    def begin(batch: Batch) -> Batch:
        with stream.begin():
            return batch.to(world.device)

    following = begin(micro_batches[0])
    for later in (*micro_batches[1:], None):
        batch = following
        stream.end(batch.tensors())
        if later is not None:
            following = begin(later)
        yield batch.padded(TOKENS) if is_compiled else batch


def reduce_loss(
    world: World,
    total: float,
    micro_batches: Sequence[Batch],
    max_loss: float,
    votes: Callable[[], Sequence[float]],
) -> StepTotals:
    """Reduce the step's totals over all ranks. `total` is this rank's sum of losses. A collective."""
    own_tokens = sum(batch.num_tokens for batch in micro_batches)
    loss_sum, num_tokens, *voted = world.sum(total, own_tokens, *votes())
    mean = loss_sum / max(1.0, num_tokens)
    world.timer.enter("update")
    is_fit = math.isfinite(mean) and mean <= max_loss
    return StepTotals(mean, int(num_tokens), is_fit, tuple(voted), max(1.0, num_tokens))


def on_device(batch: Batch, world: World, is_compiled: bool) -> Batch:
    """`batch` on this rank's device; for compiled blocks, with texts padded to a length that they know."""
    placed = batch.to(world.device)
    return placed.padded(TOKENS) if is_compiled else placed


@torch.no_grad()
def evaluate_batches(
    world: World, model: nn.Module, micro_batches: Iterable[Batch], loss: Loss, is_compiled: bool
) -> tuple[float, int]:
    """Sum of token losses without dropout, and number of target tokens, over all ranks. A collective.

    It waits for neither the device nor other ranks until the end.
    """
    losses, own_tokens = [torch.zeros((), device=world.device)], 0
    world.timer.enter("evaluate")
    model.eval()
    try:
        for batch in micro_batches:
            losses.append(loss(model, on_device(batch, world, is_compiled)))
            own_tokens += batch.num_tokens
            world.timer.enter("evaluate")  # each batch counts as progress for the watchdog
    finally:
        model.train()
    total, count = world.sum(math.fsum(torch.stack(losses).tolist()), own_tokens)
    return total, int(count)
