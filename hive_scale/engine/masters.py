"""Float32 master weights of a model that is not sharded and computes in bf16.

The module stays as it is: no hooks, and no float32 copy of what is frozen. Autograd adds the gradients of all
micro-batches in float32. Masters, gradients and bf16 copies of all trained parameters lie in one buffer each, so that a
step takes a few operators, whatever the number of parameters. An optimizer that is not elementwise gets each master in
its shape, a view of the same buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hive_scale.distributed import World
from hive_scale.param_groups import ParamGroup

ALIGNED = 64  # elements: a parameter begins at a multiple of 128 bytes, which matrix products want


def use_dtype(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """Give `parameters`, which are on the meta device, the dtype `dtype`."""
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


class Place(NamedTuple):
    """Where a parameter lies in the flat tensor of its group."""

    shape: tuple[int, ...]
    group: str  # key of the tensor in `MasterWeights.updated`
    start: int
    numel: int


class MasterWeights:
    """Masters of a model's trained parameters, with their gradients."""

    @torch.no_grad()
    def __init__(
        self, model: nn.Module, groups: Sequence[ParamGroup], weights: Mapping[str, Tensor], world: World, flat: bool
    ) -> None:
        """Take the masters' values from `weights`, which are float32. The model's parameters become views.

        The optimizer updates one flat tensor for each of `groups`, or without `flat` each master in its own shape.
        """
        self.world, self.flat = world, flat
        parameters = dict(model.named_parameters())
        sizes = [sum(aligned(parameters[name].numel()) for name in group.parameters) for group in groups]
        self._masters, self._sums = (torch.zeros(sum(sizes), device=world.device) for _ in range(2))
        self._copies = torch.zeros_like(self._masters, dtype=next(model.parameters()).dtype)
        self.updated: dict[str, Tensor] = {}  # by number of the group if `flat`, else by parameter
        self.places: dict[str, Place] = {}  # by parameter, if `flat`
        cut = zip(
            groups,
            torch.split(self._masters, sizes),
            torch.split(self._sums, sizes),
            torch.split(self._copies, sizes),
            strict=True,
        )
        for number, (group, masters, sums, copies) in enumerate(cut):
            if flat:
                self.updated[str(number)] = masters
                masters.grad = sums
            start = 0
            for name in group.parameters:
                parameter = parameters[name]
                place = Place(tuple(parameter.shape), str(number), start, parameter.numel())
                end = start + place.numel
                masters[start:end].copy_(weights[name].flatten())
                parameter.data = copies[start:end].view(place.shape)
                parameter.grad_dtype = torch.float32
                parameter.grad = sums[start:end].view(place.shape)
                if flat:
                    self.places[name] = place
                else:
                    self.updated[name] = masters[start:end].view(place.shape)
                    self.updated[name].grad = parameter.grad
                start += aligned(place.numel)
        self.copy_back()

    def groups(self, groups: Sequence[ParamGroup]) -> list[ParamGroup]:
        """`groups`, each of which names what the optimizer updates, keys of `updated`."""
        if not self.flat:
            return list(groups)
        return [replace(group, parameters=(str(number),)) for number, group in enumerate(groups)]

    def reduce(self) -> None:
        """Add up the gradients of all ranks. A collective."""
        if self.world.size > 1:
            dist.all_reduce(self._sums)

    def clear(self) -> None:
        """Set the gradients to zero for the next step."""
        self._sums.zero_()

    def copy_back(self) -> None:
        """Round the masters into the module's parameters."""
        self._copies.copy_(self._masters)


def aligned(numel: int) -> int:
    """Elements that a parameter of `numel` elements takes in a flat tensor."""
    return -(-numel // ALIGNED) * ALIGNED
