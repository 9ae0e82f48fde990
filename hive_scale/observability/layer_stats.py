"""Per-layer gradient RMS from Adam's second moment, and tanh of every gate, for any engine and sharding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import nn

from hive_scale.distributed import Fragment, World

GATE, LAYERS = ".gate", "fusion.layers."  # names of gates end, and mostly begin, so


def layer_grad_rms(
    model: nn.Module,
    fragments: Iterable[Fragment],
    step: int,
    mean_square: tuple[str, float],
    world: World,
    steps_behind: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, dict[str, float]]:
    """Return `gates` and `grad_rms` of `metrics.jsonl`, after `step` steps. A collective.

    Adam's bias-corrected second moment is the mean square of each gradient over about the last 1 / (1 - beta2) steps.
    The square root of its sum over a layer is the RMS of the layer's gradient norm, sqrt(sum(v) / (1 - beta2^t)),
    without an extra backward.

    Args: `fragments` are those of `model` that this rank owns. `mean_square` is (the optimizer's name of the second
    moment, beta2); an empty name means there is none, and only gates are returned. `steps_behind` maps a parameter to
    the steps of earlier stages that its moments contain, which the bias correction counts as well.
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
    # one synchronisation with the device, not one per parameter
    sums = torch.stack([fragment.data.sum() for fragment in kept]).tolist() if kept else []
    for fragment, value in zip(kept, sums, strict=True):
        if fragment.kind == "master":
            gates[fragment.name] += value
        else:
            squares[layer_of(fragment.name)] += value / (1 - beta2 ** (step + steps_behind.get(fragment.name, 0)))
    totals = iter(world.sum(*gates.values(), *squares.values()))
    # "0" for the gate of the first fused layer itself, "0.feed_forward" for that of a part of it
    opened = {name.removesuffix(GATE).removeprefix(LAYERS): math.tanh(next(totals)) for name in gates}
    norms = {layer: math.sqrt(next(totals)) for layer in squares}
    return ({"gates": opened} if opened else {}) | ({"grad_rms": norms} if second else {})


def layer_of(name: str) -> str:
    """``vision.encoder.layers.3.mlp.fc1.weight`` belongs to layer ``vision.3``; outside of layers, to ``vision``."""
    parts = name.split(".")
    return next((f"{parts[0]}.{part}" for part in parts if part.isdigit()), parts[0])
