"""The encoder's side: which depths are tapped, and the feature map of each.

Shapes: B pictures, V visual tokens (patches), C encoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hive_scale.config import Depths

# Released preprocessing of the two families (mean, standard deviation per channel, of pixels in [0, 1]).
PIXEL_STATISTICS = {
    "siglip_vision_model": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip_vision_model": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


def group_ends(num_layers: int, num_groups: int) -> tuple[int, ...]:
    """Last index of each of `num_groups` nearly equal runs of ``range(num_layers)``, the longer runs first."""
    size, longer = divmod(num_layers, num_groups)
    return tuple((group + 1) * size + min(group + 1, longer) - 1 for group in range(num_groups))


def encoder_depths(num_layers: int, density: float, rule: Depths) -> tuple[int, ...]:
    """Selected set S of encoder depths, ascending; depth d is the output of block d, 0 the embeddings.

    The last block is never among them, since downstream tasks read the one before it (paper 3.2, 4.5).
    """
    count = max(1, round(density * num_layers))
    if rule == "later":
        return tuple(range(num_layers - count, num_layers))
    return group_ends(num_layers, count)


def feature_maps(vision: nn.Module, pixels_BCHW: Tensor, depths: Sequence[int]) -> list[Tensor]:
    """F_l for each l in `depths` (ascending): (B, V, C) each, class token dropped.

    `vision` is a SiglipVisionModel or CLIPVisionModel. Blocks above the deepest selected are not run.
    """
    tower: Any = vision
    has_class_token = hasattr(tower.embeddings, "class_embedding")
    hidden = tower.embeddings(pixels_BCHW)
    if hasattr(tower, "pre_layrnorm"):  # CLIP normalises its embeddings (and spells it so)
        hidden = tower.pre_layrnorm(hidden)
    maps = {0: hidden}
    for depth in range(1, max(depths) + 1):
        hidden = tower.encoder.layers[depth - 1](hidden, None)
        maps[depth] = hidden
    return [maps[depth][:, 1:] if has_class_token else maps[depth] for depth in depths]


def reached(name: str, depths: Sequence[int]) -> bool:
    """Whether `feature_maps` reads the encoder parameter called `name`."""
    if name.startswith("encoder.layers."):
        return int(name.split(".")[2]) < max(depths)
    return name.startswith(("embeddings.", "pre_layrnorm."))
