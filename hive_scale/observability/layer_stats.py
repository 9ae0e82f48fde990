"""Per-layer gradient RMS from the optimizer's second moment, and tanh of every gate, for any engine and sharding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from hive_scale.distributed import Fragment, World

GATE, LAYERS = ".gate", "fusion.layers."  # names of gates end, and mostly begin, so


def layer_grad_rms(
    model: nn.Module,
    fragments: Iterable[Fragment],
    step: int,
    square_factor: Callable[[str, tuple[int, ...], int], float],
    world: World,
    steps_behind: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, dict[str, float]]:
    """Return `gates` and `grad_rms` of `metrics.jsonl`, after `step` steps. A collective.

    Adam's bias-corrected second moment is the mean square of each gradient over about the last 1 / (1 - beta2) steps.
    The square root of its sum over a layer is the RMS of the layer's gradient norm, sqrt(sum(v) / (1 - beta2^t)),
    without an extra backward.

    Args: `fragments` are those of `model` that this rank owns. `square_factor(kind, shape, steps)` is what the sum over
    a parameter's state of that kind is multiplied by to give the sum of its gradient's mean squares, after `steps`
    steps; 0 if it tells nothing of these (`OptimizerKind.square_factor`). If none does, only gates are returned.
    `steps_behind` maps a parameter to the steps of earlier stages that its moments contain, which are counted as well.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    gates = {name: 0.0 for name in names if name.endswith(GATE)}
    squares = dict.fromkeys(map(layer_of, names), 0.0)
    kept: list[tuple[Fragment, float]] = []
    shapes = {name: _shape(parameter) for name, parameter in model.named_parameters()}
    for one in fragments:
        steps = step + steps_behind.get(one.name, 0)
        factor = float(one.name in gates) if one.kind == "master" else square_factor(one.kind, shapes[one.name], steps)
        kept += [(one, factor)] if factor else []
    # one synchronisation with the device, not one per parameter
    sums = torch.stack([fragment.data.sum() for fragment, _ in kept]).tolist() if kept else []
    told = 0
    for (fragment, factor), value in zip(kept, sums, strict=True):
        if fragment.kind == "master":
            gates[fragment.name] += value
        else:
            squares[layer_of(fragment.name)] += value * factor
            told += 1
    on_any, *every = world.sum(told, *gates.values(), *squares.values())
    totals = iter(every)
    # "0" for the gate of the first fused layer itself, "0.feed_forward" for that of a part of it
    opened = {name.removesuffix(GATE).removeprefix(LAYERS): math.tanh(next(totals)) for name in gates}
    norms = {layer: math.sqrt(next(totals)) for layer in squares}
    return ({"gates": opened} if opened else {}) | ({"grad_rms": norms} if on_any else {})


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves a parameter empty


def layer_of(name: str) -> str:
    """``vision.encoder.layers.3.mlp.fc1.weight`` belongs to layer ``vision.3``; outside of layers, to ``vision``."""
    parts = name.split(".")
    return next((f"{parts[0]}.{part}" for part in parts if part.isdigit()), parts[0])
