"""Gradient of the loss with respect to every encoder layer's output, patch by patch (paper, figure 2).

Shapes: B images, L encoder layers, V patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from hive_scale.batch import Batch
from hive_scale.model.encoders import covered, patches
from hive_scale.model.hive import Hive
from hive_scale.report.svg import draw, image, overlay

PER_ROW = 6  # layers per row
TENTH = 0.1


@dataclass(frozen=True)
class GradientMaps:
    """Gradient norms of one model on some images: `norms` (B, L, V), layer 1 first; `pixels` uint8 (B, 3, H, W)."""

    name: str
    pixels: Tensor
    norms: Tensor


def gradient_maps(name: str, model: Hive, batch: Batch) -> GradientMaps:
    """Return channel norms of d loss / d hidden state, with the loss summed over each caption's tokens.

    Covers the layers that the model reads: above the deepest tapped layer there is no gradient.
    """
    model.requires_grad_(True)  # otherwise there may be no autograd graph
    states = model.encode(batch.pixels)
    hidden = model.language_forward(model.project(states), batch.tokens, None if batch.all_images else batch.has_image)
    loss = model.token_loss(hidden.flatten(0, 1)[batch.target_rows], batch.target_ids).sum()
    gradients = torch.autograd.grad(loss, states[1:])
    norms = torch.stack([patches(model.vision, gradient).norm(dim=-1) for gradient in gradients], dim=1)
    side = covered(model.vision)
    return GradientMaps(name, batch.pixels[..., :side, :side].cpu(), norms.detach().cpu())


def concentration(norms: Tensor) -> dict[str, list[float]]:
    """Statistics by layer of how evenly the gradient is spread, averaged over the images of `norms` (B, L, V).

    `entropy` is 1 for an even spread and 0 for a single patch; `top_tenth` is the share of the strongest tenth of the
    patches; `norm` is the norm of the whole gradient.
    """
    num_patches = norms.shape[-1]
    shares = norms / norms.sum(-1, keepdim=True).clamp_min(1e-30)
    entropy = -(shares * shares.clamp_min(1e-30).log()).sum(-1) / math.log(num_patches)
    strongest = shares.topk(max(1, round(TENTH * num_patches)), dim=-1).values.sum(-1)
    by_layer = {"entropy": entropy, "top_tenth": strongest, "norm": norms.norm(dim=-1)}
    return {name: [round(float(value), 6) for value in values.mean(0)] for name, values in by_layer.items()}


def gradient_figure(runs: Sequence[GradientMaps]) -> str:
    """Draw for each image one block per run: the original, then its layers from first to last, scaled per layer."""
    depth = max(run.norms.shape[1] for run in runs)
    rows_each, columns = math.ceil(depth / PER_ROW), 1 + min(depth, PER_ROW)
    blocks = [(run, index) for index in range(len(runs[0].pixels)) for run in runs]

    def paint(figure: Figure) -> None:
        axes = figure.subplots(rows_each * len(blocks), columns, squeeze=False)
        for cell in axes.flat:
            cell.set_visible(False)
        for number, (run, index) in enumerate(blocks):
            rows = axes[number * rows_each : (number + 1) * rows_each]
            pixels = run.pixels[index].permute(1, 2, 0).numpy()
            rows[0][0].set_visible(True)
            image(rows[0][0], pixels, run.name)
            for layer, norms in enumerate(run.norms[index]):
                cell = rows[layer // PER_ROW][1 + layer % PER_ROW]
                cell.set_visible(True)
                overlay(cell, pixels, _min_max(norms), f"layer {layer + 1}")

    return draw(1.1 * columns, 1.25 * rows_each * len(blocks), paint)


def _min_max(values: Tensor) -> Any:
    side = math.isqrt(len(values))
    spread = (values - values.min()) / (values.max() - values.min()).clamp_min(1e-30)
    return spread.view(side, side).numpy()
