"""Attention of words to image patches, layer by layer (paper, figure 3).

Shapes: T text tokens, V patches.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor

from hive_scale.model.encoders import covered
from hive_scale.model.hive import Hive
from hive_scale.report.svg import draw, image, overlay

MOST = 8  # number of words shown by default


@dataclass(frozen=True)
class AttentionMaps:
    """Attention maps of some words of a text.

    `maps` maps an LLM layer (from 1) to one (V,) tensor per word: shares of attention to the patches, which cover
    `pixels`, uint8 (3, H, W).
    """

    pixels: Tensor
    text: str
    words: Sequence[str]
    maps: dict[int, list[Tensor]]


def words_at(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[tuple[str, list[int]]]:
    """Return each word of the text encoded in `ids` (start and end included), with the positions of its tokens."""
    ends = [len(decode(ids[: index + 1])) for index in range(len(ids))]
    found = []
    for match in re.finditer(r"[^\W_]+", decode(ids)):
        start, end = match.span()
        tokens = [index for index in range(1, len(ids)) if ends[index - 1] < end and ends[index] > start]
        found.append((match[0], tokens))
    return found


def choose(words: Sequence[tuple[str, list[int]]], wanted: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Return the first of `words` for each of `wanted`. Raises ValueError that lists the words of the text."""
    if not wanted:
        return list(words[:MOST])
    by_name = {word.lower(): (word, tokens) for word, tokens in reversed(words)}
    for word in wanted:
        if word.lower() not in by_name:
            there = ", ".join(dict.fromkeys(word for word, _ in words))
            raise ValueError(f"--tokens: '{word}' is not in the text, whose words are {there or 'none'}")
    return [by_name[word.lower()] for word in wanted]


@torch.no_grad()
def attention_maps(
    model: Hive,
    pixels: Tensor,
    ids: Sequence[int],
    words: Sequence[tuple[str, list[int]]],
    text: str,
    layers: Sequence[int] = (),
    head: int | None = None,
) -> AttentionMaps:
    """Return attention weights over patches, averaged over each word's tokens and over heads (or of one `head`).

    Args: `pixels` uint8 (3, H, W); `layers` of the LLM, counted from 1, default all that attend to patches. Raises
    ValueError for a layer that does not attend to patches, an unknown head, or a fusion without attention over
    patches.
    """
    there = [layer + 1 for layer in model.visual_layers()]
    if not there:
        raise ValueError(f"{type(model.fusion).__name__} has no attention over patches that could be drawn")
    if missing := set(layers) - set(there):
        raise ValueError(
            f"--layers: {min(missing)} does not attend to patches; those that do: {', '.join(map(str, there))}"
        )
    tokens = torch.tensor([ids], device=model.pixel_mean.device)
    depths = [layer - 1 for layer in layers or there]
    weights = model.attention(model.encode_images(pixels[None].to(tokens.device)), tokens, depths)
    heads = next(iter(weights.values())).shape[1]
    if head is not None and not 0 <= head < heads:
        raise ValueError(f"--head: {head} is none of 0 to {heads - 1}")
    maps: dict[int, list[Tensor]] = {}
    for layer, given in weights.items():
        of_tokens = given[0].mean(0) if head is None else given[0, head]  # (T, V)
        maps[layer + 1] = [_normal(of_tokens[positions].mean(0)).cpu() for _, positions in words]
    side = covered(model.vision)
    return AttentionMaps(pixels[:, :side, :side], text, [word for word, _ in words], maps)


def attention_figure(shown: AttentionMaps) -> str:
    """Draw words across and layers down; each map is scaled from its minimum to its maximum and laid over the image."""
    pixels = shown.pixels.permute(1, 2, 0).numpy()
    columns = 1 + len(shown.words)

    def paint(figure: Figure) -> None:
        axes = figure.subplots(len(shown.maps), columns, squeeze=False)
        for row, (layer, maps) in zip(axes, shown.maps.items(), strict=True):
            image(row[0], pixels, shown.text[:24] if layer == min(shown.maps) else "")
            row[0].set_ylabel(f"layer {layer}", fontsize=7)
            for cell, word, weights in zip(row[1:], shown.words, maps, strict=True):
                side = math.isqrt(len(weights))
                spread = (weights - weights.min()) / (weights.max() - weights.min()).clamp_min(1e-30)
                overlay(cell, pixels, spread.view(side, side).numpy(), word)

    return draw(1.1 * columns, 1.25 * len(shown.maps), paint)


def _normal(weights: Tensor) -> Tensor:
    return weights / weights.sum().clamp_min(1e-30)
