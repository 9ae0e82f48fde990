"""What a step does inside the model, read off the optimizer's own state: alike for every engine and sharding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import nn

from hive_scale.distributed import Fragment, World

GATE = ".gate"


def layer_grad_rms(
    model: nn.Module,
    fragments: Iterable[Fragment],
    step: int,
    mean_square: tuple[str, float],
    world: World,
    steps_behind: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, dict[str, float]]:
    """`gates` and `grad_rms` of `metrics.jsonl`, after `step` steps. A collective.

    Adam's second moment, its bias taken off, is the mean square of each gradient over about 1 / (1 - beta2)
    steps; summed over a layer and rooted, it is the layer's gradient norm, without a backward of its own.

    Args: `fragments` are those of `model` that this rank owns; `mean_square` is the optimizer's name of that moment and
    its beta2, or "" if it has none: then gates are all that is told; `steps_behind` has, by parameter, the steps of
    earlier stages that its moments hold, for the bias is that of all its steps.
    """
    second, beta2 = mean_square
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    gates = {name: 0.0 for name in names if name.endswith(GATE)}
    squares = dict.fromkeys(map(layer_of, names), 0.0)
    kept = [
        fragment
        for fragment in fragments
        if (second and fragment.kind == second) or (fragment.kind == "master" and fragment.name in gates)
    ]
    # one wait for the device, not one per parameter
    sums = torch.stack([fragment.data.sum() for fragment in kept]).tolist() if kept else []
    for fragment, value in zip(kept, sums, strict=True):
        if fragment.kind == "master":
            gates[fragment.name] += value
        else:
            squares[layer_of(fragment.name)] += value / (1 - beta2 ** (step + steps_behind.get(fragment.name, 0)))
    totals = iter(world.sum(*gates.values(), *squares.values()))
    opened = {name.split(".")[-2]: math.tanh(next(totals)) for name in gates}
    norms = {layer: math.sqrt(next(totals)) for layer in squares}
    return ({"gates": opened} if opened else {}) | ({"grad_rms": norms} if second else {})


def layer_of(name: str) -> str:
    """``vision.encoder.layers.3.mlp.fc1.weight`` belongs to ``vision.3``, what is in no layer to ``vision``."""
    parts = name.split(".")
    return next((f"{parts[0]}.{part}" for part in parts if part.isdigit()), parts[0])
